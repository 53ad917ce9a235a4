"""How K/V memory is divided among the pools of the layer groups.

Memory grows by levels: a level is the number of blocks of the layers that keep everything. A windowed pool has so many
windows beside them as there are sequences, if each is as long as four windows (or as a sequence may be), and the blocks
of the part of a prompt that a step computes. But it never has more blocks than the others have, nor more than
`max_num_seqs` sequences ever hold at once.

    blocks │                            ╱ full      mark: max_num_seqs sequences of max_model_len tokens
           │              ______________╱
           │            ╱            __·· windowed
           │          ╱      ____··``
           │        ╱  __··``
           │      ╱╱`
           └─────────────┬────────────┬─────── level
                       mark        2 · mark

Beyond the mark nothing but the prefix cache gains. A cached prefix needs a window of blocks wherever somebody may go on
from it, so there windowed pools grow first, to twice their size, and then all in proportion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .kv_layout import KvGroup, KvLayout

_WINDOWS_PER_SEQUENCE = 4
"""How long sequences are taken to be: if they are longer, blocks of windowed pools lie idle, if shorter, of others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSplit:
    """What memory is divided for. Numbers of blocks are those that sequences can own; sizes count block 0 as well."""

    layout: KvLayout
    block_size: int
    itemsize: int
    max_num_seqs: int
    max_model_len: int
    """Tokens of the longest sequence that is wanted."""
    step_tokens: int
    """Tokens that a step computes at most."""
    must_fit: int = 0
    """Tokens of a sequence for which there shall be room, whatever that leaves for others."""

    @property
    def mark(self) -> int:
        """The level at which the wanted number of sequences of the wanted length fit at once."""
        return self.max_num_seqs * -(-self.max_model_len // self.block_size)

    def blocks(self, level: int) -> list[int]:
        """Of each group's pool."""
        floors = self.of_sequence(self.must_fit)
        return [max(self._grown(group, level), floor) for group, floor in zip(self.layout.groups, floors, strict=True)]

    def of_sequence(self, num_tokens: int) -> list[int]:
        """Blocks of each pool with which a sequence of so many tokens runs by itself: its prompt in parts as small as
        they must be."""
        return [group.layer.blocks_of_sequence(num_tokens, self.block_size) for group in self.layout.groups]

    def _grown(self, group: KvGroup, level: int) -> int:
        mark = self.mark
        most = self._needed(group, self.max_num_seqs, self.max_model_len)
        if most >= mark:  # no window, or none that matters
            return min(level, mark) + max(0, level - 2 * mark)
        if level >= mark:
            return min(level, most * level // mark)
        window = group.layer.blocks_of_sequence(self.max_model_len, self.block_size)
        typical_len = min(self.max_model_len, _WINDOWS_PER_SEQUENCE * (group.layer.window or self.max_model_len))
        per_sequence = -(-typical_len // self.block_size)
        step_blocks = -(-self.step_tokens // self.block_size)
        return min(level, most, step_blocks + window * max(level, per_sequence) // per_sequence)

    def _needed(self, group: KvGroup, num_seqs: int, num_tokens: int) -> int:
        return group.layer.blocks_of_sequences(num_seqs, num_tokens, self.block_size, self.step_tokens)

    def num_bytes(self, blocks: Sequence[int]) -> int:
        return sum(
            (count + 1) * group.block_bytes(self.block_size, self.itemsize)
            for count, group in zip(blocks, self.layout.groups, strict=True)
        )

    def largest(self, num_bytes: int) -> list[int]:
        """The pools that so much memory makes. Empty if not even block 0 fits, or what must."""
        if self.num_bytes(self.blocks(0)) > num_bytes:
            return []
        return self.blocks(_largest(lambda level: self.num_bytes(self.blocks(level)) <= num_bytes))

    def longest_sequence(self, blocks: Sequence[int]) -> int:
        """Tokens of the longest sequence that these pools hold, `max_model_len` at most."""
        longest = self.max_model_len
        for count, group in zip(blocks, self.layout.groups, strict=True):
            if count < group.layer.blocks_of_sequence(longest, self.block_size):
                longest = min(longest, count * self.block_size)
        return longest

    def longest_that_fits(self, num_bytes: int) -> int:
        """Tokens of the longest sequence, `max_model_len` at most, that could run in so much memory by itself."""

        def fits(num_blocks: int) -> bool:
            return self.num_bytes(self.of_sequence(num_blocks * self.block_size)) <= num_bytes

        most = -(-self.max_model_len // self.block_size)
        num_blocks = most if fits(most) else _largest(fits)
        return min(self.max_model_len, num_blocks * self.block_size)


def _largest(holds: Callable[[int], bool]) -> int:
    """The largest number that holds, where everything below one that holds does too, and 0 is taken to."""
    high = 1
    while holds(high):
        high *= 2
    low = high // 2
    while low + 1 < high:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low
