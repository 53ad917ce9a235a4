"""Block tables of all live sequences: match a cached prefix, grow, fork, copy on write, publish, give back, free.

Pure bookkeeping over block ids; the model room owns the memory behind them. A sequence has one table per layer group,
and each group has a pool of its own: layers that see everything need all blocks of a sequence until it ends, layers
with a sliding window those of the window (group.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .block import Block
from .config import PoolConfig
from .group import BlockGroup
from .hashing import BlockHashes
from .table import BlockTable


@dataclass(slots=True, frozen=True)
class PrefixMatch:
    """Published blocks that hold the beginning of a token sequence. Not yet taken: use it at once."""

    blocks: tuple[tuple[Block, ...], ...]
    """For each layer group; in one with a window only those that the next token sees, the last of the prefix."""
    num_tokens: int

    @property
    def num_free(self) -> tuple[int, ...]:
        """In each group, blocks among them that are free now, and stop being so when the match is taken."""
        return tuple(sum(block.ref_count == 0 for block in blocks) for blocks in self.blocks)


@dataclass(slots=True, frozen=True)
class PrefixMisses:
    """Why the tokens after a match were not found, in tokens. With the match they add up to the whole sequence."""

    num_new_tokens: int
    """In blocks that were never published, with these tokens before them and this salt, as far as is remembered."""
    num_evicted_tokens: int
    """In blocks that were published once, and have been evicted, or can no longer be reached past one that was, or
    without one that was: a window's layers keep fewer blocks."""
    num_tail_tokens: int
    """What no cache could have held: the part after the last full block, or that block, where it ends the sequence."""


@dataclass(slots=True, frozen=True)
class WriteCopy:
    """A shared block that is about to be written: copy its K/V from `source` to the private `target` first."""

    group: int
    source: int
    target: int


@dataclass(slots=True, frozen=True)
class BlockCounts:
    """Blocks of all groups together. A block of one group is not as large as one of another."""

    num_usable: int
    num_free: int
    """Cached ones included."""
    num_cached_free: int
    num_shared: int
    num_evicted: int
    """Running total."""
    usage: float
    """Share of the fullest group's blocks that are in tables: 1 means that one more cannot be had there."""


class BlockManager:
    """Owner of every block table. Sequences are known by id from `begin` or `fork` until `free`."""

    def __init__(
        self,
        pools: Sequence[PoolConfig],
        block_size: int,
        max_step_tokens: int,
        *,
        enable_prefix_caching: bool = True,
    ) -> None:
        """One pool for each layer group; `max_step_tokens`: the most that one sequence computes in a step."""
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.groups = tuple(BlockGroup(pool, block_size, max_step_tokens) for pool in pools)
        self.has_windows = any(group.window is not None for group in self.groups)
        self.tables: dict[str, tuple[BlockTable, ...]] = {}

    @property
    def num_free_blocks(self) -> list[int]:
        """Of each group."""
        return [group.pool.num_free for group in self.groups]

    def counts(self) -> BlockCounts:
        pools = [group.pool for group in self.groups]
        return BlockCounts(
            num_usable=sum([pool.num_usable for pool in pools]),
            num_free=sum([pool.num_free for pool in pools]),
            num_cached_free=sum([pool.num_cached_free for pool in pools]),
            num_shared=sum([pool.num_shared for pool in pools]),
            num_evicted=sum([pool.num_evicted for pool in pools]),
            usage=max([(pool.num_usable - pool.num_free) / pool.num_usable for pool in pools]),
        )

    def can_hold(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens could run if it had the pools to itself."""
        return all(group.can_hold(self.blocks_for(num_tokens)) for group in self.groups)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    # ------------------------------------------------------------------ prefixes

    def match(self, hashes: BlockHashes, token_ids: Sequence[int]) -> PrefixMatch:
        """The longest published prefix of full blocks, leaving at least one token to compute (its logits are what the
        next token is drawn from). Groups without a window must have all of it, others what the next token sees."""
        if not self.enable_prefix_caching:
            return PrefixMatch(((),) * len(self.groups), 0)
        hashes.extend(token_ids, len(token_ids))
        count = self._longest_match(hashes, self._num_matchable(len(token_ids)))
        num_tokens = count * self.block_size
        blocks = tuple(
            tuple(group.pool.index[hashes.hashes[index]] for index in range(group.first_needed(num_tokens), count))
            for group in self.groups
        )
        return PrefixMatch(blocks, num_tokens)

    def _longest_match(self, hashes: BlockHashes, count: int) -> int:
        for group in self.groups:
            if group.window is None:
                count = group.longest_match(hashes, count)
        windowed = [group for group in self.groups if group.window is not None]
        # One that ends earlier for one group's sake may want other blocks of another.
        while (shorter := min([group.longest_match(hashes, count) for group in windowed], default=count)) < count:
            count = shorter
        return count

    def _num_matchable(self, num_tokens: int) -> int:
        """Full blocks of a sequence that a match may cover: all but the one that holds the last token."""
        return (num_tokens - 1) // self.block_size

    def explain_misses(self, hashes: BlockHashes, num_tokens: int, match: PrefixMatch) -> PrefixMisses:
        """What a match of the first `num_tokens` tokens did not find, and why. Ask before the pools change again;
        `hashes` must cover the tokens, as they do after `match`."""
        num_matchable = self._num_matchable(num_tokens)
        first_missed = match.num_tokens // self.block_size
        # A block is published in all groups at once, so one that remembers it is enough.
        num_evicted = sum(
            any(group.pool.was_published(hashes.hashes[index]) for group in self.groups)
            for index in range(first_missed, num_matchable)
        )
        return PrefixMisses(
            num_new_tokens=(num_matchable - first_missed - num_evicted) * self.block_size,
            num_evicted_tokens=num_evicted * self.block_size,
            num_tail_tokens=num_tokens - num_matchable * self.block_size,
        )

    def publish(self, seq_id: str, hashes: BlockHashes, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Make the full blocks among the first `num_computed_tokens` findable. Call it once their K/V are written, and
        before `pass_window` gives any of them back."""
        if not self.enable_prefix_caching:
            return
        num_full = num_computed_tokens // self.block_size
        for group, table in zip(self.groups, self.tables[seq_id], strict=True):
            if table.num_published >= num_full:
                continue
            hashes.extend(token_ids, num_computed_tokens)
            for index in range(table.num_published, num_full):
                group.pool.publish(
                    table.blocks[index], hashes.hashes[index], hashes.parent(index), hashes.tokens[index]
                )
            table.num_published = num_full

    def unpublish(self, seq_id: str) -> None:
        """Make sure that nobody finds this sequence's blocks any more; sequences that share them keep them."""
        held = [block.hash for table in self.tables[seq_id] for block in table.held]
        self._withdraw([block_hash for block_hash in held if block_hash is not None])

    def withdraw(self, hashes: BlockHashes) -> None:
        """The same for whatever can be found by these hashes, be it of a sequence that has no tables any more, or has
        given the block back."""
        self._withdraw(hashes.hashes)

    def _withdraw(self, block_hashes: Sequence[bytes]) -> None:
        for group in self.groups:
            group.pool.withdraw(block_hashes)

    # ------------------------------------------------------------------ how many blocks it takes

    def blocks_to_admit(self, match: PrefixMatch, num_tokens: int) -> list[int]:
        """Free blocks of each group that a sequence of `num_tokens` should find, to be computed in parts of a fair
        size."""
        needed = []
        for group, blocks, num_free in zip(self.groups, match.blocks, match.num_free, strict=True):
            first = group.first_needed(match.num_tokens)
            wanted = min(self.blocks_for(num_tokens) - first, group.wanted_blocks)
            needed.append(max(0, wanted - len(blocks)) + num_free)
        return needed

    def blocks_owed(self, seq_id: str, num_tokens: int) -> list[int]:
        """Blocks of each group that an admitted sequence has not taken yet and will hold on to when `num_tokens` are
        computed."""
        owed = []
        for group, table in zip(self.groups, self.tables[seq_id], strict=True):
            most = min(self.blocks_for(num_tokens) - table.num_passed, group.steady_blocks)
            owed.append(max(0, most - len(table.held)))
        return owed

    def blocks_to_grow(self, seq_id: str, num_computed_tokens: int, num_tokens: int) -> list[int]:
        """Free blocks of each group that `grow` would take, copies of shared blocks included."""
        num_blocks = self.blocks_for(num_tokens)
        return [
            max(0, num_blocks - len(table.blocks))
            + (self._written_foreign_block(table, num_computed_tokens) is not None)
            for table in self.tables[seq_id]
        ]

    def tokens_with_room(self, seq_id: str, num_computed_tokens: int, num_tokens: int) -> int:
        """The largest number, `num_tokens` at most, that `grow` can make room for now."""
        for group, table in zip(self.groups, self.tables[seq_id], strict=True):
            num_free = group.pool.num_free - (self._written_foreign_block(table, num_computed_tokens) is not None)
            if num_free < 0:
                return num_computed_tokens
            num_tokens = min(num_tokens, (len(table.blocks) + num_free) * self.block_size)
        return num_tokens

    # ------------------------------------------------------------------ tables

    def begin(self, seq_id: str, match: PrefixMatch, num_tokens: int) -> None:
        """Open a sequence's tables with a matched prefix (possibly empty), and take the blocks of all `num_tokens`
        tokens in groups without a window. In others blocks are taken as they are written, by `grow`: only so many
        are ever held. Raises OutOfBlocks."""
        if seq_id in self.tables:
            raise ValueError(f"sequence {seq_id} has tables already")
        num_matched = match.num_tokens // self.block_size
        tables = []
        for group, blocks in zip(self.groups, match.blocks, strict=True):
            table = BlockTable(num_passed=num_matched - len(blocks), num_published=num_matched)
            table.append([group.pool.null] * table.num_passed)
            group.pool.acquire(blocks)
            table.append(blocks)
            if group.window is None:
                table.append(group.pool.allocate(self.blocks_for(num_tokens) - num_matched))
            tables.append(table)
        self.tables[seq_id] = tuple(tables)

    def grow(self, seq_id: str, num_computed_tokens: int, num_tokens: int) -> list[WriteCopy]:
        """Make room for tokens [num_computed_tokens, num_tokens) to be written.

        New blocks are appended, and a block that others see and that would be written is replaced by a private one: the
        returned copies must be carried out before the step writes anything, and in order (or all reads before all
        writes), since a source may be free by then. Raises OutOfBlocks if a pool is short: ask `blocks_to_grow` before.
        """
        needed = self.blocks_to_grow(seq_id, num_computed_tokens, num_tokens)
        copies = []
        for index, (group, table) in enumerate(zip(self.groups, self.tables[seq_id], strict=True)):
            if not needed[index]:
                continue
            fresh = group.pool.allocate(needed[index])
            shared = self._written_foreign_block(table, num_computed_tokens)
            if shared is not None:
                private = fresh.pop()
                table.replace(num_computed_tokens // self.block_size, private)
                group.pool.release([shared])
                copies.append(WriteCopy(index, shared.id, private.id))
            table.append(fresh)
        return copies

    def _written_foreign_block(self, table: BlockTable, num_computed_tokens: int) -> Block | None:
        """The block of the first written token, if others see it: by sharing it, or by its hash (a forked sequence
        recomputes the last prompt token, whose block may be full). All later blocks were allocated for writing."""
        index = num_computed_tokens // self.block_size
        if index < len(table.blocks):
            block = table.blocks[index]
            if block.ref_count > 1 or block.hash is not None:
                return block
        return None

    def can_fork(self, parent_id: str, num_tokens: int) -> bool:
        """Whether a sequence still has all that a token at position `num_tokens` sees."""
        tables = zip(self.groups, self.tables[parent_id], strict=True)
        return all(table.num_passed <= group.first_needed(num_tokens) for group, table in tables)

    def fork(self, parent_id: str, child_id: str, num_tokens: int) -> None:
        """Open a sequence that shares its parent's first `num_tokens` tokens, a partial last block included."""
        if child_id in self.tables:
            raise ValueError(f"sequence {child_id} has tables already")
        tables = []
        for group, parent in zip(self.groups, self.tables[parent_id], strict=True):
            table = BlockTable(
                num_passed=parent.num_passed, num_published=min(parent.num_published, num_tokens // self.block_size)
            )
            table.append(parent.blocks[: self.blocks_for(num_tokens)])
            group.pool.acquire(table.held)
            tables.append(table)
        self.tables[child_id] = tuple(tables)

    def pass_window(self, seq_id: str, num_tokens: int) -> None:
        """Give back what no token at position `num_tokens` or later sees. The first `num_tokens` must be computed, by
        steps that have ended: one that is still running reads what it sees, and so would its repetition."""
        for group, table in zip(self.groups, self.tables[seq_id], strict=True):
            first = group.first_needed(num_tokens)
            if first > table.num_passed:
                group.pool.release(table.pass_by(first, group.pool.null))

    def passes_next_at(self, seq_id: str) -> int:
        """How many tokens must be computed before `pass_window` has anything to do."""
        return min(group.passes_next_at(table) for group, table in zip(self.groups, self.tables[seq_id], strict=True))

    def free(self, seq_id: str) -> None:
        """Close a sequence's tables. Raises KeyError if it has none."""
        for group, table in zip(self.groups, self.tables.pop(seq_id), strict=True):
            group.pool.release(reversed(table.held))

    def block_ids(self, seq_id: str) -> tuple[list[int], ...]:
        """Live views of the tables, one per group."""
        return tuple(table.ids for table in self.tables[seq_id])

    def num_exclusive_tokens(self, seq_id: str, num_computed_tokens: int) -> int:
        """Computed tokens in blocks that nobody else holds: what is lost if this sequence is evicted."""
        shared = sum(block.ref_count > 1 for block in self.tables[seq_id][0].held)
        return max(0, num_computed_tokens - shared * self.block_size)
