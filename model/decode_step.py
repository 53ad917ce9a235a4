"""A decode step whose input lies on the device, so that it can be captured once and replayed.

The host writes four numbers per row: the token to run, or where among the last drawn ones it stands; its position;
its slot. Block tables and sampling parameters are read from the slots, lengths follow from positions, and the tokens
that the step draws stay where the next step finds them. So a step may be launched before anybody has looked at the
one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..kernels.backend import DecodeInputs, DeviceBackend, DrawParameters
from ..scheduler.batch import ScheduledRow
from .device import to_device
from .device_slots import DeviceSlots
from .registry import CausalLM

_FIELDS = 4
"""Of a row: token, source, position, slot."""
NO_SOURCE = -1


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a captured step is captured for."""

    num_rows: int
    """Rows beyond the batch's own are padding."""
    max_kv_len: int
    """No row's K/V may be longer."""


class DecodeStep:
    """The computation and its static tensors; not yet captured, see cuda_graph.py."""

    def __init__(
        self,
        model: CausalLM,
        backend: DeviceBackend,
        kv_layers: Sequence[torch.Tensor],
        slots: DeviceSlots,
        *,
        max_rows: int,
        max_model_len: int,
        vocab_size: int,
    ) -> None:
        """`max_rows` rows of at most `max_model_len` tokens at once; `kv_layers`: each layer's part of its pool."""
        self._model = model
        self._backend = backend
        self._kv_layers = kv_layers
        self._slots = slots
        self._block_size = kv_layers[0].shape[3]
        self.max_model_len = max_model_len
        device = kv_layers[0].device
        self._inputs = torch.zeros((_FIELDS, max_rows), dtype=torch.int64, device=device)
        self.drawn = torch.zeros(max_rows, dtype=torch.int64, device=device)
        """Tokens of the latest step, -1 where its logits were NaN. [max_rows]"""
        # Captured steps of all shapes write here, instead of keeping memory of their own each.
        self._logits = torch.empty((max_rows, vocab_size), dtype=backend.dtype, device=device)
        # Of each group: what a plan leaves there depends on the group's window.
        self._workspaces = [
            backend.decode_workspace(group.attention, self._block_size, max_rows, max_model_len)
            for group in model.layer_groups
        ]

    def load(self, rows: Sequence[ScheduledRow], sources: Sequence[int], shape: StepShape) -> None:
        """Send a step's numbers. `sources[r]`: the place in `drawn` of row r's token, if the host does not know it."""
        count = len(rows)
        inputs = np.zeros((_FIELDS, shape.num_rows), np.int64)
        inputs[1] = NO_SOURCE
        inputs[3] = self._slots.padding_slot
        inputs[0, :count] = [0 if row.num_unknown_tokens else row.token_ids[row.num_computed_tokens] for row in rows]
        inputs[1, :count] = sources
        inputs[2, :count] = [row.num_computed_tokens for row in rows]
        inputs[3, :count] = self._slots.update(rows)
        self._inputs[:, : shape.num_rows].copy_(to_device(inputs, self._inputs.device), non_blocking=True)

    def compute(self, shape: StepShape) -> None:
        """Run the loaded rows: K/V to the pool, the tokens drawn to `drawn`, logits to where `logits` finds them."""
        tokens, sources, positions, slot_ids = self._inputs[:, : shape.num_rows]
        slots = self._slots
        tokens = torch.where(sources >= 0, self.drawn.index_select(0, sources.clamp(min=0)), tokens)
        # A row of NaN logits drew -1; its request ends before this step's result is looked at.
        tokens = tokens.clamp(min=0)
        exists = slot_ids != slots.padding_slot
        kv_lens = torch.where(exists, positions + 1, 0).to(torch.int32)
        plans = [self._plan(group, shape, slot_ids, positions, kv_lens) for group in range(len(self._workspaces))]
        hidden = self._model.forward(tokens, plans, self._kv_layers)
        logits = self._logits[: shape.num_rows]
        logits.copy_(self._model.logits(hidden))
        parameters = DrawParameters(
            temperatures=slots.temperatures.index_select(0, slot_ids),
            top_ks=slots.top_ks.index_select(0, slot_ids),
            top_ps=slots.top_ps.index_select(0, slot_ids),
            min_ps=slots.min_ps.index_select(0, slot_ids),
            seeds=slots.seeds.index_select(0, slot_ids),
        )
        self.drawn[: shape.num_rows].copy_(self._backend.draw(logits, parameters, positions + 1))

    def _plan(
        self, group: int, shape: StepShape, slot_ids: torch.Tensor, positions: torch.Tensor, kv_lens: torch.Tensor
    ) -> Any:
        """The backend's, of one layer group: slot_ids and positions int64 [num_rows], kv_lens int32 [num_rows]."""
        width = -(-shape.max_kv_len // self._block_size)
        tables = self._slots.block_tables[group, :, :width].index_select(0, slot_ids)  # int32 [num_rows, width]
        blocks = tables.gather(1, (positions // self._block_size)[:, None]).view(-1).to(torch.int64)
        places = blocks * self._block_size + positions % self._block_size
        inputs = DecodeInputs(
            max_kv_len=shape.max_kv_len,
            workspace=self._workspaces[group],
            kv_lens=kv_lens,
            positions=positions,
            slots=torch.where(kv_lens > 0, places, -1),
            block_tables=tables,
        )
        return self._backend.plan_decode(inputs, self._model.layer_groups[group].attention, self._block_size)

    def logits(self, num_rows: int) -> torch.Tensor:
        """Of the latest step, until the next one: [num_rows, vocab]."""
        return self._logits[:num_rows]
