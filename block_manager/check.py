"""The invariants of pools and tables, checked as a whole. For tests, and for a debugger; O(pools)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .group import BlockGroup
from .manager import BlockManager
from .pool import NULL_BLOCK_ID, BlockPool
from .table import BlockTable


class InvariantViolation(AssertionError):
    """The bookkeeping contradicts itself: a bug in this room."""


def check(manager: BlockManager) -> None:
    """Raises InvariantViolation naming the first contradiction."""
    for tables in manager.tables.values():
        _require(len(tables) == len(manager.groups), "a sequence lacks a table")
    for index, group in enumerate(manager.groups):
        tables_of_group = [tables[index] for tables in manager.tables.values()]
        for table in tables_of_group:
            _check_table(table, group)
        _check_pool(group.pool, tables_of_group)


def _check_table(table: BlockTable, group: BlockGroup) -> None:
    _require([block.id for block in table.blocks] == table.ids, "a table's ids differ from its blocks")
    held = [block.id for block in table.held]
    _require(len(set(held)) == len(held), "a table holds a block twice")
    _require(table.ids[: table.num_passed] == [NULL_BLOCK_ID] * table.num_passed, "a passed block is still held")
    _require(group.window is not None or table.num_passed == 0, "a table without a window has given blocks back")
    _require(table.num_passed <= table.num_published or not group.pool.index, "a block was passed unpublished")


def _check_pool(pool: BlockPool, tables: Sequence[BlockTable]) -> None:
    owned: Counter[int] = Counter(block.id for table in tables for block in table.held)
    free = [block.id for block in pool.free_list]
    _require(len(free) == len(set(free)), "a block is in the free list twice")
    _require(len(free) == len(pool.free_list), "the free list's length differs from its walk")
    _require(NULL_BLOCK_ID not in owned and NULL_BLOCK_ID not in free, "the reserved block is owned or free")
    _require(set(free).isdisjoint(owned), "a block is free and in a table")
    _require(len(free) + len(owned) == pool.num_usable, "a block is neither free nor in a table")
    _require(pool.null.ref_count == 0 and pool.null.hash is None, "the reserved block is used like another")
    for block in pool.blocks[1:]:
        _require(block.ref_count == owned[block.id], f"{block!r} is in {owned[block.id]} tables")
        if block.hash is not None:
            _require(pool.index.get(block.hash) is block, f"{block!r} bears a hash that does not find it")
            _require(block.token_bytes is not None and block.parent_hash is not None, f"{block!r} lost its tokens")
    published = list(pool.index.values())
    _require(len({block.id for block in published}) == len(published), "a block is published twice")
    _require(all(block.hash is not None for block in published), "the index holds a block without a hash")
    _require(
        pool.num_cached_free == sum(block.ref_count == 0 for block in published), "the count of cached blocks is off"
    )
    _require(pool.num_shared == sum(count > 1 for count in owned.values()), "the count of shared blocks is off")
    _require(
        not any(block_hash in pool.evicted for block_hash in pool.index), "a findable block is remembered as evicted"
    )
    _require(len(pool.evicted) <= pool.evicted.capacity, "more evictions are remembered than there is room for")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvariantViolation(message)
