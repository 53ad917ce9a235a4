"""One layer group: its pool, and which blocks of a sequence its layers look at.

A token at position p sees the keys at positions > p - window. Once all tokens before position n are computed, nobody
will ask for keys at positions <= n - window any more, and blocks that hold nothing else can go. With a window of 20
and blocks of 4, of 27 computed tokens:

    blocks   │ 0  │ 0  │████│████│████│████│███·│
                       ↑├────────────────────┤
         position 8 = n + 1 - window      n = 27 sees 20 keys, its own among them
"""

from __future__ import annotations

import sys

from .config import PoolConfig
from .hashing import BlockHashes
from .pool import BlockPool
from .table import BlockTable

NEVER = sys.maxsize


class BlockGroup:
    """A pool with the arithmetic of its window; without one, everything is needed until a sequence ends."""

    def __init__(self, config: PoolConfig, block_size: int, max_step_tokens: int) -> None:
        """`max_step_tokens`: the most that one sequence computes in a step."""
        if config.window is not None and config.window < 1:
            raise ValueError(f"a window must hold a token at least, not {config.window}")
        self.pool = BlockPool(config.num_blocks)
        self.window = config.window
        self._block_size = block_size
        self.steady_blocks = NEVER
        """The most that a decoding sequence holds: those of its window, one more since a window need not begin at a
        block's edge. With that it may also be a token longer: what a step still in flight reads is not given back."""
        self.wanted_blocks = NEVER
        """What should be free for a sequence with a long prompt: beside its window, what half a step computes. It runs
        with less, in smaller parts."""
        if self.window is not None:
            self.steady_blocks = -(-self.window // block_size) + 1
            self.wanted_blocks = min(self.pool.num_usable, self.steady_blocks + -(-max_step_tokens // (2 * block_size)))

    def first_needed(self, num_tokens: int) -> int:
        """The first block that a token at position `num_tokens`, or a later one, sees anything of."""
        return 0 if self.window is None else max(0, num_tokens + 1 - self.window) // self._block_size

    def passes_next_at(self, table: BlockTable) -> int:
        """How many tokens must be computed before the window has passed one block more."""
        return NEVER if self.window is None else (table.num_passed + 1) * self._block_size + self.window - 1

    def can_hold(self, num_blocks: int) -> bool:
        """Whether a sequence of so many blocks could run if it had the pool to itself."""
        return min(num_blocks, self.steady_blocks) <= self.pool.num_usable

    def longest_match(self, hashes: BlockHashes, limit: int) -> int:
        """The most leading blocks, `limit` at most, of which every one that a token behind them sees is published."""
        if self.window is None:
            return next((index for index in range(limit) if not self._is_published(hashes, index)), limit)
        count, index = limit, limit - 1
        # From the end: whatever lies before the window of the longest match need not be looked up.
        while index >= self.first_needed(count * self._block_size):
            if not self._is_published(hashes, index):
                count = index
            index -= 1
        return count

    def _is_published(self, hashes: BlockHashes, index: int) -> bool:
        return self.pool.lookup(hashes.hashes[index], hashes.parent(index), hashes.tokens[index]) is not None
