"""Logits that a request changes by token id: biases, and stops held back until min_tokens.

A request's ids go to the device once, when its sequence is first seen; a step only adds where each row begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..scheduler.batch import ScheduledRow
from ..scheduler.sampling_params import SamplingParams
from .device import ids_to_device


@dataclass(slots=True)
class _Entry:
    params: SamplingParams
    eos_token_ids: tuple[int, ...]
    bias_ids: torch.Tensor  # int64 [num_biases]
    biases: torch.Tensor  # fp32 [num_biases]
    stop_ids: torch.Tensor  # int64 [num_stops]


class LogitEdits:
    """What `logit_bias`, `min_tokens` and the stop ids of live sequences mean, as tensors."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._entries: dict[str, _Entry] = {}

    def drop(self, seq_ids: Iterable[str]) -> None:
        """Forget sequences that ended; unknown ids are ignored."""
        for seq_id in seq_ids:
            self._entries.pop(seq_id, None)

    def forbid_stops(self, logits: torch.Tensor, rows: Sequence[ScheduledRow], indices: Sequence[int]) -> None:
        """-inf for the eos and stop ids of rows `indices`, in place. logits fp32 [n, vocab]."""
        ids = [self._entry(rows[index]).stop_ids for index in indices]
        logits.view(-1).index_fill_(0, self._places(ids, indices), float("-inf"))

    def add_bias(self, logits: torch.Tensor, rows: Sequence[ScheduledRow], indices: Sequence[int]) -> None:
        """The biases of rows `indices`, in place. logits fp32 [n, vocab]."""
        entries = [self._entry(rows[index]) for index in indices]
        places = self._places([entry.bias_ids for entry in entries], indices)
        logits.view(-1).index_add_(0, places, torch.cat([entry.biases for entry in entries]))

    def _places(self, ids: list[torch.Tensor], indices: Sequence[int]) -> torch.Tensor:
        """Positions in the flattened logits: the ids of each row, moved to where the row begins."""
        starts = ids_to_device(indices, self._device) * self._vocab_size  # [num_rows]
        counts = [part.numel() for part in ids]
        repeats = ids_to_device(counts, self._device)  # [num_rows]
        return torch.cat(ids).add_(starts.repeat_interleave(repeats, output_size=sum(counts)))

    def _entry(self, row: ScheduledRow) -> _Entry:
        """The sequence's tensors; another sequence under the same id has parameters of its own."""
        entry = self._entries.get(row.seq_id)
        if entry is None or entry.params is not row.params or entry.eos_token_ids != row.eos_token_ids:
            entry = self._entries[row.seq_id] = self._make(row)
        return entry

    def _make(self, row: ScheduledRow) -> _Entry:
        params = row.params
        stops = [token for token in (*row.eos_token_ids, *params.stop_token_ids) if token < self._vocab_size]
        count = len(params.logit_bias)
        return _Entry(
            params,
            row.eos_token_ids,
            torch.from_numpy(np.fromiter(params.logit_bias.keys(), np.int64, count)).to(self._device),
            torch.from_numpy(np.fromiter(params.logit_bias.values(), np.float32, count)).to(self._device),
            ids_to_device(stops, self._device),
        )
