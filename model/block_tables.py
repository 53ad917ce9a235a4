"""Block tables as arrays, kept from step to step: a table changes by a block now and then, not in every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..scheduler.batch import ScheduledRow

_Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class _Entry:
    slot: int
    """Its row of the array."""
    ids: list[int]
    """The scheduler's table as it was when last seen. It holds the same int objects, so comparing is a pointer each."""


class BlockTables:
    """The block tables of live sequences. What is kept is compared with the scheduler's live view at every use, so that
    it can be old but never wrong."""

    def __init__(self, group: int = 0) -> None:
        """Of one layer group."""
        self._group = group
        self._entries: dict[str, _Entry] = {}
        self._free_slots: list[int] = []
        self.array: _Ints = np.zeros((0, 0), np.int64)
        """Each slot's table, and anything behind it; another array when it has grown. [capacity, width]"""

    def drop(self, seq_ids: Iterable[str]) -> None:
        """Forget sequences that ended; unknown ids are ignored."""
        for seq_id in seq_ids:
            entry = self._entries.pop(seq_id, None)
            if entry is not None:
                self._free_slots.append(entry.slot)

    def gather(self, rows: Sequence[ScheduledRow], counts: _Ints) -> _Ints:
        """The first `counts[r]` blocks of each row, block 0 behind them. [num_rows, max(counts)]"""
        slots = self.update(rows)
        width = int(counts.max())
        tables = self.array[:, :width][slots]  # a copy
        tables *= np.arange(width) < counts[:, None]
        return tables

    def update(self, rows: Sequence[ScheduledRow]) -> list[int]:
        """Bring these rows' tables up to date; where in `array` each is."""
        slots = []
        for row in rows:
            ids = row.block_ids[self._group]
            entry = self._entries.get(row.seq_id)
            if entry is None or entry.ids != ids:
                entry = self._note(row.seq_id, entry, ids)
            slots.append(entry.slot)
        return slots

    def _note(self, seq_id: str, entry: _Entry | None, ids: Sequence[int]) -> _Entry:
        """A table that is new, or has changed."""
        if entry is None:
            if not self._free_slots:
                self._reserve(2 * len(self.array) + 8, self.array.shape[1])
            entry = self._entries[seq_id] = _Entry(self._free_slots.pop(), [])
        known = len(entry.ids)
        if ids[:known] != entry.ids:
            known = 0
        if len(ids) > self.array.shape[1]:
            self._reserve(len(self.array), 2 * len(ids))
        self.array[entry.slot, known : len(ids)] = ids[known:]
        entry.ids[known:] = ids[known:]
        return entry

    def _reserve(self, capacity: int, width: int) -> None:
        """Make the array larger; by doubling, so that it is rare."""
        old = self.array
        self._free_slots.extend(range(len(old), capacity))
        self.array = np.zeros((capacity, width), np.int64)
        self.array[: old.shape[0], : old.shape[1]] = old
