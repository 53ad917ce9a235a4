"""What a decode step needs of each sequence, kept on the device: block tables and sampling parameters.

A sequence has a slot from its first decode step to its end. What changes between two steps is little (a block now and
then, a new sequence), so only that is sent; a captured step reads the rest where it lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from ..scheduler.batch import ScheduledRow
from .device import to_device

_MASK64 = 2**64 - 1


@dataclass(slots=True)
class _Entry:
    slot: int
    views: tuple[Sequence[int], ...]
    """The scheduler's live tables. A sequence that comes back after a preemption has others, and so has another
    sequence under the same id: whoever has these has these parameters too."""
    sent: tuple[list[int], ...]
    """Those tables as the device knows them."""
    num_written_blocks: int = 0
    """Leading blocks that are never written again, and therefore never replaced, as of the last look."""
    newest_blocks: list[int] = field(default_factory=list)
    """Those behind them, one of each table. Empty: there was no look yet."""


class DeviceSlots:
    """Slots 0 … num_slots - 1, and one more that is nobody's: padded rows of a captured step stand there."""

    def __init__(
        self, num_slots: int, max_blocks: int, block_size: int, device: torch.device, num_groups: int = 1
    ) -> None:
        """A table of `max_blocks` blocks for each slot and layer group."""
        self._device = device
        self._entries: dict[str, _Entry] = {}
        self._free = list(range(num_slots - 1, -1, -1))
        self.editing: set[str] = set()
        """Those of them that do not, or not always, draw from the model's logits as they are."""
        self._max_blocks = max_blocks
        self._block_size = block_size
        self.padding_slot = num_slots
        self.block_tables = torch.zeros((num_groups, num_slots + 1, max_blocks), dtype=torch.int32, device=device)
        self.temperatures = torch.zeros(num_slots + 1, dtype=torch.float32, device=device)
        self.top_ps = torch.ones(num_slots + 1, dtype=torch.float32, device=device)
        self.min_ps = torch.zeros(num_slots + 1, dtype=torch.float32, device=device)
        self.top_ks = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        self.seeds = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)

    def drop(self, seq_ids: Iterable[str]) -> None:
        """Free the slots of sequences that ended; unknown ids are ignored."""
        for seq_id in seq_ids:
            entry = self._entries.pop(seq_id, None)
            if entry is not None:
                self._free.append(entry.slot)
                self.editing.discard(seq_id)

    def update(self, rows: Sequence[ScheduledRow]) -> npt.NDArray[np.int64]:
        """Bring the device up to date for these rows; their slots. [num_rows]"""
        fresh: list[tuple[int, ScheduledRow]] = []
        places: list[int] = []
        blocks: list[int] = []
        slots: list[int] = []
        for row in rows:
            entry = self._entries.get(row.seq_id)
            if entry is None or entry.views[0] is not row.block_ids[0]:
                entry = self._enter(row, rows)
                fresh.append((entry.slot, row))
            written = row.num_computed_tokens // self._block_size
            # Most rows write where they wrote in the step before.
            newest = [ids[written] for ids in row.block_ids]
            if written != entry.num_written_blocks or newest != entry.newest_blocks:
                self._note_changes(entry, written, places, blocks)
            slots.append(entry.slot)
        if places:
            where, values = to_device(np.array((places, blocks), np.int64), self._device)
            self.block_tables.view(-1).index_copy_(0, where, values.to(torch.int32))
        if fresh:
            self._write_parameters(fresh)
        return np.array(slots, np.int64)

    def _enter(self, row: ScheduledRow, rows: Sequence[ScheduledRow]) -> _Entry:
        """A slot for one of the rows, of which nothing is known: its own if it has one."""
        known = self._entries.get(row.seq_id)
        if known is None and not self._free:
            self._make_room(rows)
        slot = self._free.pop() if known is None else known.slot
        entry = self._entries[row.seq_id] = _Entry(slot, row.block_ids, tuple([] for _ in row.block_ids))
        if row.params.may_edit_logits:
            self.editing.add(row.seq_id)
        else:
            self.editing.discard(row.seq_id)
        return entry

    def _make_room(self, rows: Sequence[ScheduledRow]) -> None:
        """Free slots for rows that have none: those of sequences that do not run in this step (preempted ones, say)
        are taken, and sent anew when they are back. A step has no more rows than there are slots."""
        present = {row.seq_id for row in rows}
        num_missing = len(present - self._entries.keys())
        absent = [seq_id for seq_id in self._entries if seq_id not in present]
        self.drop(absent[:num_missing])

    def _note_changes(self, entry: _Entry, written: int, places: list[int], blocks: list[int]) -> None:
        """Append what the device does not know of a row's tables yet, whose first `written` blocks are full. Costs the
        same however long they are.

        While a table lives it grows at its end, copy-on-write replaces the block of the first written token, and block
        0 takes the place of those that a window has passed, which nobody reads; no other entry ever changes.
        """
        for group, (ids, sent) in enumerate(zip(entry.views, entry.sent, strict=True)):
            first_place = (group * self.block_tables.shape[1] + entry.slot) * self._max_blocks
            # Steps that do not come by here replace blocks too: look at all that were written since the last time.
            for index in range(entry.num_written_blocks, min(written + 1, len(sent))):
                if sent[index] != ids[index]:
                    sent[index] = ids[index]
                    places.append(first_place + index)
                    blocks.append(ids[index])
            if len(sent) < len(ids):
                places.extend(range(first_place + len(sent), first_place + len(ids)))
                blocks.extend(ids[len(sent) :])
                sent.extend(ids[len(sent) :])
        entry.num_written_blocks, entry.newest_blocks = written, [ids[written] for ids in entry.views]

    def _write_parameters(self, fresh: Sequence[tuple[int, ScheduledRow]]) -> None:
        params = [row.params for _, row in fresh]
        floats = np.array([(p.temperature, p.top_p, p.min_p) for p in params], np.float32).T
        seeds = np.array([row.seed & _MASK64 for _, row in fresh], np.uint64).view(np.int64)
        integers = np.stack((np.array([slot for slot, _ in fresh]), np.array([p.top_k for p in params]), seeds))
        slots, top_ks, seed_bits = to_device(integers, self._device)
        temperatures, top_ps, min_ps = to_device(np.ascontiguousarray(floats), self._device)
        self.temperatures.index_copy_(0, slots, temperatures)
        self.top_ps.index_copy_(0, slots, top_ps)
        self.min_ps.index_copy_(0, slots, min_ps)
        self.top_ks.index_copy_(0, slots, top_ks.to(torch.int32))
        self.seeds.index_copy_(0, slots, seed_bits)
