"""The invariants of pool and tables, checked as a whole. For tests, and for a debugger; O(pool)."""

from __future__ import annotations

from collections import Counter

from .manager import BlockManager


class InvariantViolation(AssertionError):
    """The bookkeeping contradicts itself: a bug in this room."""


def check(manager: BlockManager) -> None:
    """Raises InvariantViolation naming the first contradiction."""
    pool = manager.pool
    owned: Counter[int] = Counter(
        block.id for tables in manager.tables.values() for table in tables for block in table.blocks
    )
    free = [block.id for block in pool.free_list]
    _require(len(free) == len(set(free)), "a block is in the free list twice")
    _require(len(free) == len(pool.free_list), "the free list's length differs from its walk")
    _require(0 not in owned and 0 not in free, "the reserved block is owned or free")
    _require(set(free).isdisjoint(owned), "a block is free and in a table")
    _require(len(free) + len(owned) == pool.num_usable, "a block is neither free nor in a table")
    for block in pool.blocks[1:]:
        _require(block.ref_count == owned[block.id], f"{block!r} is in {owned[block.id]} tables")
        if block.hash is not None:
            indexed = [index.get(block.hash) for index in pool.index]
            _require(block in indexed, f"{block!r} bears a hash that does not find it")
            _require(block.token_bytes is not None and block.parent_hash is not None, f"{block!r} lost its tokens")
    published = [block for index in pool.index for block in index.values()]
    _require(len({block.id for block in published}) == len(published), "a block is published twice")
    _require(all(block.hash is not None for block in published), "the index holds a block without a hash")
    _require(
        pool.num_cached_free == sum(block.ref_count == 0 for block in published), "the count of cached blocks is off"
    )
    _require(pool.num_shared == sum(count > 1 for count in owned.values()), "the count of shared blocks is off")
    for index, evicted in zip(pool.index, pool.evicted, strict=True):
        _require(not any(block_hash in evicted for block_hash in index), "a findable block is remembered as evicted")
        _require(len(evicted) <= evicted.capacity, "more evictions are remembered than there is room for")
    for tables in manager.tables.values():
        for table in tables:
            _require([block.id for block in table.blocks] == table.ids, "a table's ids differ from its blocks")
            _require(len(set(table.ids)) == len(table.ids), "a table holds a block twice")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvariantViolation(message)
