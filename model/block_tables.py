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
    ids: list[int]
    """The scheduler's table as it was when last seen. It holds the same int objects, so comparing is a pointer each."""
    array: _Ints  # [len(ids)], the same


class BlockTables:
    """The block tables of live sequences. What is kept is compared with the scheduler's live view at every use, so that
    it can be old but never wrong."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def drop(self, seq_ids: Iterable[str]) -> None:
        """Forget sequences that ended; unknown ids are ignored."""
        for seq_id in seq_ids:
            self._entries.pop(seq_id, None)

    def gather(self, rows: Sequence[ScheduledRow], counts: Sequence[int]) -> _Ints:
        """The first `counts[r]` blocks of each row, block 0 behind them. [num_rows, max(counts)]"""
        tables = np.zeros((len(rows), max(counts)), np.int64)
        for table, row, count in zip(tables, rows, counts, strict=True):
            table[:count] = self._current(row.seq_id, row.block_ids[0])[:count]
        return tables

    def _current(self, seq_id: str, ids: Sequence[int]) -> _Ints:
        entry = self._entries.get(seq_id)
        if entry is not None and ids == entry.ids:
            return entry.array
        known = 0 if entry is None else len(entry.ids)
        if entry is None or ids[:known] != entry.ids:
            entry = self._entries[seq_id] = _Entry(list(ids), np.array(ids, np.int64))
        else:
            entry.ids.extend(ids[known:])
            entry.array = np.concatenate((entry.array, np.array(ids[known:], np.int64)))
        return entry.array
