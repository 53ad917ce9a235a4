"""Decode steps on a device that works on its own: captured, and fed with tokens that the host has not seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ..kernels.backend import DeviceBackend
from ..scheduler.batch import ScheduledBatch, ScheduledRow
from .cuda_graph import DecodeGraphs
from .decode_step import NO_SOURCE, DecodeStep
from .device import ids_to_device, to_device
from .device_slots import DeviceSlots
from .drawn import Drawn
from .registry import CausalLM
from .sampler import Sampler

MAX_GRAPH_ROWS = 256


class DecodeAhead:
    """Knows where the tokens of the latest step lie, and runs batches of nothing but decodes."""

    def __init__(
        self,
        model: CausalLM,
        backend: DeviceBackend,
        sampler: Sampler,
        kv_layers: Sequence[torch.Tensor],
        *,
        max_num_seqs: int,
        max_model_len: int,
        vocab_size: int,
    ) -> None:
        block_size = kv_layers[0].shape[3]
        self._sampler = sampler
        self._max_rows = min(max_num_seqs, MAX_GRAPH_ROWS)
        # One more than sequences: the probe after a failure brings one of its own.
        self._slots = DeviceSlots(
            max_num_seqs + 1,
            -(-max_model_len // block_size),
            block_size,
            kv_layers[0].device,
            num_groups=len(model.layer_groups),
        )
        step = DecodeStep(
            model,
            backend,
            kv_layers,
            self._slots,
            max_rows=max_num_seqs,
            max_model_len=max_model_len,
            vocab_size=vocab_size,
        )
        self._drawn = step.drawn
        self._graphs = DecodeGraphs(step, max_rows=self._max_rows)
        self._places: dict[str, int] = {}
        """Sequence → where in `drawn` the latest step left its token."""

    def release(self, seq_ids: Iterable[str]) -> None:
        self._slots.drop(seq_ids)

    def takes(self, batch: ScheduledBatch) -> bool:
        """Whether all of a batch are decodes, and few enough."""
        return len(batch.rows) <= self._max_rows and batch.only_decodes

    def launch(self, rows: Sequence[ScheduledRow]) -> Drawn:
        """Queue a step of decodes; `rows` as `takes` wants them."""
        sources = [self._places[row.seq_id] if row.num_unknown_tokens else NO_SOURCE for row in rows]
        shape = self._graphs.shape(len(rows), max([row.num_computed_tokens for row in rows]) + 1)
        self._graphs.step.load(rows, sources, shape)
        self._graphs.run(shape)
        self._places = {row.seq_id: index for index, row in enumerate(rows)}
        asking = self._asking(rows)
        if not asking:
            return self._sampler.start(self._drawn[: len(rows)], rows)
        redrawn = self._redraw(rows, asking)
        return self._sampler.start(self._drawn[: len(rows)], rows).with_logprobs_of(redrawn, asking)

    def _asking(self, rows: Sequence[ScheduledRow]) -> list[int]:
        """The rows for which the captured step's draw is not all, or not right."""
        editing = self._slots.editing
        if not editing:
            return []
        return [index for index, row in enumerate(rows) if row.seq_id in editing and self._sampler.asks_for_more(row)]

    def _redraw(self, rows: Sequence[ScheduledRow], indices: Sequence[int]) -> Drawn:
        """Draw these rows' tokens once more, as they ask for it, and leave them in the place of the first ones."""
        where = ids_to_device(indices, self._drawn.device)
        logits = self._graphs.step.logits(len(rows)).index_select(0, where)
        redrawn = self._sampler.sample(logits, [rows[index] for index in indices])
        self._drawn.index_copy_(0, where, redrawn.ids)
        return redrawn

    def keep(self, drawn: Drawn) -> None:
        """Leave the tokens of any step where the next one looks for them."""
        self._drawn[: len(drawn.seq_ids)].copy_(drawn.ids)
        self._places = {seq_id: index for index, seq_id in enumerate(drawn.seq_ids)}

    def fill_in(self, token_ids: torch.Tensor, batch: ScheduledBatch) -> None:
        """Put the tokens that the host does not know into a step's, int64 [num_tokens], where it has left a 0."""
        targets, sources = [], []
        end = 0
        for row in batch.rows:
            end += row.num_scheduled_tokens
            if row.num_unknown_tokens and row.draws_token:
                targets.append(end - 1)
                sources.append(self._places[row.seq_id])
        if targets:
            where, whence = to_device(np.array((targets, sources), np.int64), token_ids.device)
            token_ids.index_copy_(0, where, self._drawn.index_select(0, whence).clamp(min=0))
