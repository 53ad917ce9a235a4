"""Block tables of all live sequences: match a cached prefix, grow, fork, copy on write, publish, free.

Pure bookkeeping over block ids; the model room owns the memory behind them. One table per layer group and sequence:
today there is one group with full attention; a group whose layers see a sliding window differs only in which blocks
a table still needs, so it joins as another entry of `num_groups` over the same pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .block import Block
from .hashing import BlockHashes
from .pool import BlockPool


@dataclass(slots=True, frozen=True)
class PrefixMatch:
    """Published blocks that hold the beginning of a token sequence. Not yet taken: use it at once."""

    blocks: tuple[tuple[Block, ...], ...]
    """For each layer group."""
    num_tokens: int
    num_free: int
    """Blocks among them that are free now, and stop being so when the match is taken."""


@dataclass(slots=True, frozen=True)
class PrefixMisses:
    """Why the tokens after a match were not found, in tokens. With the match they add up to the whole sequence."""

    num_new_tokens: int
    """In blocks that were never published, with these tokens before them and this salt, as far as is remembered."""
    num_evicted_tokens: int
    """In blocks that were published once, and have been evicted, or can no longer be reached past one that was."""
    num_tail_tokens: int
    """What no cache could have held: the part after the last full block, or that block, where it ends the sequence."""


@dataclass(slots=True, frozen=True)
class WriteCopy:
    """A shared block that is about to be written: copy its K/V from `source` to the private `target` first."""

    source: int
    target: int


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence in one layer group, in token order."""

    blocks: list[Block] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    """The same as ids: the live view that batches carry."""
    num_published: int = 0
    """Leading blocks that need no further look by `publish`."""

    def append(self, blocks: Sequence[Block]) -> None:
        self.blocks.extend(blocks)
        self.ids.extend(block.id for block in blocks)


class BlockManager:
    """Owner of every block table. Sequences are known by id from `begin` or `fork` until `free`."""

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True, num_groups: int = 1
    ) -> None:
        """`num_blocks` counts the reserved block 0 too."""
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_groups = num_groups
        self.pool = BlockPool(num_blocks, num_groups)
        self.tables: dict[str, tuple[BlockTable, ...]] = {}

    @property
    def num_free_blocks(self) -> int:
        return self.pool.num_free

    @property
    def capacity_tokens(self) -> int:
        """Tokens that one sequence could hold if it had the pool to itself."""
        return self.pool.num_usable // self.num_groups * self.block_size

    def match(self, hashes: BlockHashes, token_ids: Sequence[int]) -> PrefixMatch:
        """The longest published prefix of full blocks, leaving at least one token to compute (its logits are
        what the next token is drawn from)."""
        if not self.enable_prefix_caching:
            return PrefixMatch(((),) * self.num_groups, 0, 0)
        hashes.extend(token_ids, len(token_ids))
        num_full = self._num_matchable(len(token_ids))
        matched: list[list[Block]] = [[] for _ in range(self.num_groups)]
        for index in range(num_full):
            row = [
                self.pool.lookup(group, hashes.hashes[index], hashes.parent(index), hashes.tokens[index])
                for group in range(self.num_groups)
            ]
            if any(block is None for block in row):
                break
            for blocks, block in zip(matched, row, strict=True):
                assert block is not None
                blocks.append(block)
        num_free = sum(block.ref_count == 0 for blocks in matched for block in blocks)
        return PrefixMatch(tuple(map(tuple, matched)), len(matched[0]) * self.block_size, num_free)

    def _num_matchable(self, num_tokens: int) -> int:
        """Full blocks of a sequence that a match may cover: all but the one that holds the last token."""
        return (num_tokens - 1) // self.block_size

    def explain_misses(self, hashes: BlockHashes, num_tokens: int, match: PrefixMatch) -> PrefixMisses:
        """What a match of the first `num_tokens` tokens did not find, and why. Ask before the pool changes again;
        `hashes` must cover the tokens, as they do after `match`."""
        num_matchable = self._num_matchable(num_tokens)
        first_missed = match.num_tokens // self.block_size
        num_evicted = sum(
            all(self.pool.was_published(group, hashes.hashes[index]) for group in range(self.num_groups))
            for index in range(first_missed, num_matchable)
        )
        return PrefixMisses(
            num_new_tokens=(num_matchable - first_missed - num_evicted) * self.block_size,
            num_evicted_tokens=num_evicted * self.block_size,
            num_tail_tokens=num_tokens - num_matchable * self.block_size,
        )

    def blocks_to_admit(self, match: PrefixMatch, num_tokens: int) -> int:
        """Free blocks that `begin` and growing to `num_tokens` use up."""
        per_group = self.blocks_for(num_tokens) - match.num_tokens // self.block_size
        return max(0, per_group) * self.num_groups + match.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks per group that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def begin(self, seq_id: str, match: PrefixMatch) -> None:
        """Open a sequence's tables with a matched prefix (possibly empty)."""
        if seq_id in self.tables:
            raise ValueError(f"sequence {seq_id} has tables already")
        tables = tuple(BlockTable() for _ in range(self.num_groups))
        for table, blocks in zip(tables, match.blocks, strict=True):
            self.pool.acquire(blocks)
            table.append(blocks)
            table.num_published = len(blocks)
        self.tables[seq_id] = tables

    def blocks_to_grow(self, seq_id: str, num_computed_tokens: int, num_tokens: int) -> int:
        """Free blocks that `grow` would take, copies of shared blocks included."""
        needed = 0
        for table in self.tables[seq_id]:
            needed += max(0, self.blocks_for(num_tokens) - len(table.blocks))
            needed += self._written_foreign_block(table, num_computed_tokens) is not None
        return needed

    def grow(self, seq_id: str, num_computed_tokens: int, num_tokens: int) -> list[WriteCopy]:
        """Make room for tokens [num_computed_tokens, num_tokens) to be written.

        New blocks are appended, and a block that others see and that would be written is replaced by a private one: the
        returned copies must be carried out before the step writes anything, and in order (or all reads before all
        writes), since a source may be free by then. Raises OutOfBlocks and changes nothing if the pool is short.
        """
        fresh = self.pool.allocate(self.blocks_to_grow(seq_id, num_computed_tokens, num_tokens))
        copies = []
        for table in self.tables[seq_id]:
            shared = self._written_foreign_block(table, num_computed_tokens)
            if shared is not None:
                private = fresh.pop()
                index = num_computed_tokens // self.block_size
                table.blocks[index], table.ids[index] = private, private.id
                self.pool.release([shared])
                copies.append(WriteCopy(shared.id, private.id))
            missing = max(0, self.blocks_for(num_tokens) - len(table.blocks))
            # Pop order keeps ids ascending in a fresh pool, which makes block tables pleasant to read.
            table.append([fresh.pop(0) for _ in range(missing)])
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

    def fork(self, parent_id: str, child_id: str, num_tokens: int) -> None:
        """Open a sequence that shares its parent's first `num_tokens` tokens, a partial last block included."""
        if child_id in self.tables:
            raise ValueError(f"sequence {child_id} has tables already")
        tables = []
        for parent in self.tables[parent_id]:
            blocks = parent.blocks[: self.blocks_for(num_tokens)]
            self.pool.acquire(blocks)
            table = BlockTable(num_published=min(parent.num_published, num_tokens // self.block_size))
            table.append(blocks)
            tables.append(table)
        self.tables[child_id] = tuple(tables)

    def publish(self, seq_id: str, hashes: BlockHashes, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Make the full blocks among the first `num_computed_tokens` findable. Call it once their K/V are written."""
        if not self.enable_prefix_caching:
            return
        num_full = num_computed_tokens // self.block_size
        for group, table in enumerate(self.tables[seq_id]):
            if table.num_published >= num_full:
                continue
            hashes.extend(token_ids, num_computed_tokens)
            for index in range(table.num_published, num_full):
                self.pool.publish(
                    group, table.blocks[index], hashes.hashes[index], hashes.parent(index), hashes.tokens[index]
                )
            table.num_published = num_full

    def unpublish(self, seq_id: str) -> None:
        """Make sure that nobody finds this sequence's blocks any more; sequences that share them keep them."""
        for table in self.tables[seq_id]:
            self.pool.unpublish(table.blocks)

    def withdraw(self, hashes: BlockHashes) -> None:
        """The same for whatever can be found by these hashes, be it of a sequence that has no tables any more."""
        for index in self.pool.index:
            found = [index.get(block_hash) for block_hash in hashes.hashes]
            self.pool.unpublish([block for block in found if block is not None])

    def free(self, seq_id: str) -> None:
        """Close a sequence's tables. Raises KeyError if it has none."""
        for table in self.tables.pop(seq_id):
            self.pool.release(reversed(table.blocks))

    def block_ids(self, seq_id: str) -> tuple[list[int], ...]:
        """Live views of the tables, one per group."""
        return tuple(table.ids for table in self.tables[seq_id])

    def num_exclusive_tokens(self, seq_id: str, num_computed_tokens: int) -> int:
        """Computed tokens in blocks that nobody else holds: what is lost if this sequence is evicted."""
        table = self.tables[seq_id][0]
        shared = sum(block.ref_count > 1 for block in table.blocks)
        return max(0, num_computed_tokens - shared * self.block_size)
