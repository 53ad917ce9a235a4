"""What penalties remember: how often each token stands in a sequence, on the device, kept from step to step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..scheduler.batch import ScheduledRow
from .device import ids_to_device

_FIRST_CAPACITY = 4


@dataclass(slots=True)
class _Entry:
    slot: int
    num_prompt_tokens: int
    num_counted: int
    """Tokens of the sequence that the counts include."""


class TokenCounts:
    """Counts of the sequences that have penalties; one slot of two device tensors each.

    Counting is idempotent: a row seen again adds only the tokens that are new since.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._entries: dict[str, _Entry] = {}
        self._free_slots: list[int] = []
        self._outputs = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)  # [capacity, vocab]
        self._in_prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)  # [capacity, vocab]

    def drop(self, seq_ids: Iterable[str]) -> None:
        """Forget sequences that ended; unknown ids are ignored."""
        for seq_id in seq_ids:
            entry = self._entries.pop(seq_id, None)
            if entry is not None:
                self._free_slots.append(entry.slot)

    def gather(self, rows: Sequence[ScheduledRow]) -> tuple[torch.Tensor, torch.Tensor]:
        """Bring the rows' counts up to date: (output counts int32 [n, vocab], in the prompt bool [n, vocab])."""
        self._forget_changed(rows)
        self._admit([row for row in rows if row.seq_id not in self._entries])
        self._count_new_outputs(rows)
        slots = ids_to_device([self._entries[row.seq_id].slot for row in rows], self._device)  # [n]
        return self._outputs.index_select(0, slots), self._in_prompt.index_select(0, slots)

    def add_drawn(self, rows: Sequence[ScheduledRow], drawn: torch.Tensor) -> None:
        """Count tokens that the device has just drawn for rows that were gathered, int64 [n]: the host need not know
        them. A negative one is no token."""
        slots = ids_to_device([self._entries[row.seq_id].slot for row in rows], self._device)  # [n]
        places = slots * self._vocab_size + drawn.clamp(min=0)
        self._outputs.view(-1).index_add_(0, places, (drawn >= 0).to(torch.int32))
        for row in rows:
            self._entries[row.seq_id].num_counted = row.num_tokens + 1

    def _forget_changed(self, rows: Sequence[ScheduledRow]) -> None:
        """A sequence that is shorter than what was counted (a step is run again, or it is another one), or whose prompt
        changed: start over."""
        for row in rows:
            entry = self._entries.get(row.seq_id)
            if entry is not None and (
                row.num_tokens < entry.num_counted or row.num_prompt_tokens != entry.num_prompt_tokens
            ):
                self.drop([row.seq_id])

    def _admit(self, rows: Sequence[ScheduledRow]) -> None:
        if not rows:
            return
        self._reserve(len(rows))
        prompt_places: list[int] = []
        slots = []
        for row in rows:
            slot = self._free_slots.pop()
            slots.append(slot)
            self._entries[row.seq_id] = _Entry(slot, row.num_prompt_tokens, row.num_prompt_tokens)
            start = slot * self._vocab_size
            prompt_places.extend(start + token for token in row.token_ids[: row.num_prompt_tokens])
        slot_ids = ids_to_device(slots, self._device)
        self._outputs.index_fill_(0, slot_ids, 0)
        self._in_prompt.index_fill_(0, slot_ids, False)
        self._in_prompt.view(-1).index_fill_(0, ids_to_device(prompt_places, self._device), True)

    def _reserve(self, count: int) -> None:
        """Make sure that `count` slots are free; capacity doubles, so that growing is rare."""
        capacity = self._outputs.shape[0]
        wanted = max(capacity, _FIRST_CAPACITY)
        while wanted - capacity + len(self._free_slots) < count:
            wanted *= 2
        if wanted > capacity:
            added = (wanted - capacity, self._vocab_size)
            self._outputs = torch.cat((self._outputs, self._outputs.new_zeros(added)))
            self._in_prompt = torch.cat((self._in_prompt, self._in_prompt.new_zeros(added)))
            self._free_slots.extend(range(capacity, wanted))

    def _count_new_outputs(self, rows: Sequence[ScheduledRow]) -> None:
        places: list[Iterable[int]] = []
        for row in rows:
            entry = self._entries[row.seq_id]
            start = entry.slot * self._vocab_size
            places.append([start + token for token in row.token_ids[entry.num_counted :]])
            entry.num_counted = max(entry.num_counted, len(row.token_ids))
        flat = ids_to_device(list(itertools.chain.from_iterable(places)), self._device)
        if flat.numel():
            ones = torch.ones(flat.shape, dtype=torch.int32, device=self._device)
            self._outputs.view(-1).index_add_(0, flat, ones)
