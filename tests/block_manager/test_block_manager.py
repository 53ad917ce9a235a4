"""Blocks, prefix chain and tables by themselves; the state machine in tests/scheduler drives them all together."""

from __future__ import annotations

import pytest
from octavo.block_manager.block import Block, FreeBlockList
from octavo.block_manager.check import InvariantViolation, check
from octavo.block_manager.config import PoolConfig
from octavo.block_manager.evicted import EvictedHashes
from octavo.block_manager.hashing import BlockHashes, chain_hash, root_hash, token_bytes
from octavo.block_manager.manager import BlockManager, PrefixMisses
from octavo.block_manager.pool import BlockPool, OutOfBlocks

BLOCK = 4


def fill(manager: BlockManager, seq_id: str, tokens: list[int], salt: str = "") -> int:
    """Admit, compute and publish a sequence; returns the number of cached tokens."""
    hashes = BlockHashes(manager.block_size, salt)
    match = manager.match(hashes, tokens)
    manager.begin(seq_id, match, len(tokens))
    manager.grow(seq_id, match.num_tokens, len(tokens))
    manager.publish(seq_id, hashes, tokens, len(tokens))
    check(manager)
    return match.num_tokens


def test_free_list_keeps_order_and_refuses_misuse() -> None:
    blocks = [Block(i) for i in range(4)]
    free = FreeBlockList()
    for block in blocks[:3]:
        free.push_back(block)
    free.push_front(blocks[3])
    free.remove(blocks[1])
    assert [block.id for block in free] == [3, 0, 2]
    assert len(free) == 3
    with pytest.raises(ValueError, match="not in the free list"):
        free.remove(blocks[1])
    with pytest.raises(ValueError, match="already"):
        free.push_back(blocks[0])
    assert [free.pop_front().id for _ in range(3)] == [3, 0, 2]
    with pytest.raises(IndexError):
        free.pop_front()


def test_pool_refuses_double_release_and_overdraft() -> None:
    pool = BlockPool(4)
    taken = pool.allocate(2)
    pool.release(taken)
    with pytest.raises(ValueError, match="more often"):
        pool.release(taken[:1])
    with pytest.raises(OutOfBlocks):
        pool.allocate(4)
    assert pool.num_free == 3
    with pytest.raises(ValueError, match="reserved"):
        BlockPool(1)


def test_hash_chain_depends_on_everything_before() -> None:
    first, second = BlockHashes(BLOCK), BlockHashes(BLOCK)
    first.extend([1, 2, 3, 4, 5, 6, 7, 8, 9], 9)
    second.extend([0, 2, 3, 4, 5, 6, 7, 8], 8)
    assert len(first.hashes) == 2
    assert first.tokens[1] == second.tokens[1]
    assert first.hashes[1] != second.hashes[1]
    assert first.hashes[0] == chain_hash(root_hash(""), token_bytes([1, 2, 3, 4]))
    assert root_hash("a") != root_hash("b")


def test_extending_a_chain_in_steps_equals_extending_at_once() -> None:
    tokens = list(range(23))
    stepwise, at_once = BlockHashes(BLOCK, "s"), BlockHashes(BLOCK, "s")
    for count in range(24):
        assert stepwise.extend(tokens, count) == count // BLOCK
    at_once.extend(tokens, 23)
    assert stepwise.hashes == at_once.hashes


def test_a_hit_covers_full_blocks_and_leaves_a_token_to_compute() -> None:
    manager = BlockManager([PoolConfig(16)], BLOCK, 64)
    assert fill(manager, "a", [1, 2, 3, 4, 5, 6, 7, 8]) == 0
    assert fill(manager, "b", [1, 2, 3, 4, 5, 6, 7, 8]) == 4
    assert fill(manager, "c", [1, 2, 3, 4, 5, 6, 7, 8, 9]) == 8
    assert fill(manager, "d", [1, 2, 3, 4, 0, 6, 7, 8, 9]) == 4
    assert fill(manager, "e", [1, 2, 3, 4, 5, 6, 7, 8, 9], salt="other") == 0
    assert manager.groups[0].pool.num_shared == 2


def test_freed_prefixes_are_found_until_their_blocks_are_needed() -> None:
    manager = BlockManager([PoolConfig(5)], BLOCK, 64)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    fill(manager, "a", tokens)
    manager.free("a")
    assert manager.groups[0].pool.num_free == 4
    assert manager.groups[0].pool.num_cached_free == 2
    assert fill(manager, "b", tokens) == 8
    manager.free("b")
    # Blocks without a hash go first, then the end of the prefix, its beginning last.
    fill(manager, "c", [0] * 12)
    manager.free("c")
    assert manager.match(BlockHashes(BLOCK), tokens).num_tokens == 4


def misses(manager: BlockManager, tokens: list[int], salt: str = "") -> PrefixMisses:
    """Why a match of these tokens would not cover them all, were they asked for now."""
    hashes = BlockHashes(manager.block_size, salt)
    return manager.explain_misses(hashes, len(tokens), manager.match(hashes, tokens))


def test_a_miss_is_new_until_its_block_was_published() -> None:
    manager = BlockManager([PoolConfig(16)], BLOCK, 64)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert misses(manager, tokens) == PrefixMisses(8, 0, 1)
    fill(manager, "a", tokens)
    assert misses(manager, tokens) == PrefixMisses(0, 0, 1)
    assert misses(manager, tokens, "other") == PrefixMisses(8, 0, 1)
    assert misses(manager, [1, 2, 3, 4, 0, 6, 7, 8, 9]) == PrefixMisses(4, 0, 1)


@pytest.mark.parametrize(("num_tokens", "num_tail"), [(1, 1), (3, 3), (4, 4), (5, 1), (7, 3), (8, 4), (9, 1)])
def test_the_tail_is_what_no_hit_may_cover(num_tokens: int, num_tail: int) -> None:
    manager = BlockManager([PoolConfig(16)], BLOCK, 64)
    tokens = list(range(num_tokens))
    assert misses(manager, tokens).num_tail_tokens == num_tail
    fill(manager, "a", tokens)
    manager.free("a")
    assert misses(manager, tokens) == PrefixMisses(0, 0, num_tail)


def test_an_evicted_block_is_told_from_a_new_one_and_can_come_back() -> None:
    manager = BlockManager([PoolConfig(4)], BLOCK, 64)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    fill(manager, "a", tokens)
    manager.free("a")
    assert manager.groups[0].pool.num_evicted == 0
    fill(manager, "b", [0] * 8)  # the free block without a hash, and the end of the prefix
    assert manager.groups[0].pool.num_evicted == 1
    assert misses(manager, tokens) == PrefixMisses(0, 4, 1)
    manager.free("b")
    fill(manager, "c", [7] * 12)
    manager.free("c")
    # What was left of the prefix, and both blocks of "b".
    assert manager.groups[0].pool.num_evicted == 4
    assert misses(manager, tokens) == PrefixMisses(0, 8, 1)
    fill(manager, "a", tokens)
    assert misses(manager, tokens) == PrefixMisses(0, 0, 1)


def test_a_block_behind_an_evicted_one_is_no_new_one() -> None:
    manager = BlockManager([PoolConfig(6)], BLOCK, 64)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8]
    fill(manager, "first", tokens[:4])
    # Computed at the same time, so its own first block stays private: "first" holds the published one.
    manager.begin("second", manager.match(BlockHashes(BLOCK), [9]), 8)
    manager.grow("second", 0, 8)
    manager.publish("second", BlockHashes(BLOCK), tokens, 8)
    manager.free("first")
    manager.grow("second", 8, 16)
    fill(manager, "third", [0])
    assert manager.groups[0].pool.num_evicted == 1
    assert misses(manager, [*tokens, 9]) == PrefixMisses(0, 8, 1)


def test_what_was_withdrawn_after_a_failure_is_not_called_evicted() -> None:
    manager = BlockManager([PoolConfig(16)], BLOCK, 64)
    fill(manager, "a", [1, 2, 3, 4, 5])
    manager.unpublish("a")
    manager.free("a")
    assert manager.groups[0].pool.num_evicted == 0
    assert misses(manager, [1, 2, 3, 4, 5]) == PrefixMisses(4, 0, 1)


def test_the_memory_of_evictions_is_bounded() -> None:
    evicted = EvictedHashes(capacity=2)
    for name in (b"a", b"b", b"a", b"c"):
        evicted.add(name)
    assert [name in evicted for name in (b"a", b"b", b"c")] == [True, False, True]
    evicted.discard(b"a")
    evicted.discard(b"unknown")
    assert len(evicted) == 1
    manager = BlockManager([PoolConfig(3)], BLOCK, 64)
    for index in range(100):
        fill(manager, "a", [index] * 8)
        manager.free("a")
    assert len(manager.groups[0].pool.evicted) == 12
    assert manager.groups[0].pool.num_evicted == 198


def test_a_colliding_hash_is_no_hit_when_the_tokens_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.block_manager.hashing.chain_hash", lambda parent, tokens: b"same")
    manager = BlockManager([PoolConfig(8)], BLOCK, 64)
    fill(manager, "a", [1, 2, 3, 4, 5])
    assert manager.match(BlockHashes(BLOCK), [1, 2, 3, 4, 5]).num_tokens == 4
    assert manager.match(BlockHashes(BLOCK), [9, 2, 3, 4, 5]).num_tokens == 0
    assert manager.match(BlockHashes(BLOCK, "salt"), [1, 2, 3, 4, 5]).num_tokens == 0


def test_a_forked_sequence_copies_before_it_writes() -> None:
    manager = BlockManager([PoolConfig(16)], BLOCK, 64)
    fill(manager, "leader", [1, 2, 3, 4, 5, 6])
    manager.fork("leader", "child", 5)
    shared = manager.block_ids("leader")[0][1]
    assert manager.block_ids("child")[0] == manager.block_ids("leader")[0]
    (copy,) = manager.grow("child", 5, 6)
    assert copy.source == shared
    assert manager.block_ids("child")[0] == [manager.block_ids("leader")[0][0], copy.target]
    # Now the leader is alone with its block and writes in place.
    assert manager.grow("leader", 6, 7) == []
    check(manager)


def test_a_fork_that_outlives_its_leader_does_not_write_a_published_block() -> None:
    manager = BlockManager([PoolConfig(16)], BLOCK, 64)
    fill(manager, "leader", [1, 2, 3, 4])
    manager.fork("leader", "child", 3)
    manager.free("leader")
    (copy,) = manager.grow("child", 3, 4)
    assert manager.groups[0].pool.blocks[copy.target].hash is None
    assert manager.groups[0].pool.blocks[copy.source].hash is not None
    check(manager)


def test_growing_beyond_the_pool_changes_nothing() -> None:
    manager = BlockManager([PoolConfig(4)], BLOCK, 64)
    fill(manager, "a", [1] * 8)
    before = list(manager.block_ids("a")[0])
    with pytest.raises(OutOfBlocks):
        manager.grow("a", 8, 17)
    assert manager.block_ids("a")[0] == before
    check(manager)


def test_without_prefix_caching_nothing_is_published() -> None:
    manager = BlockManager([PoolConfig(8)], BLOCK, 64, enable_prefix_caching=False)
    fill(manager, "a", [1, 2, 3, 4, 5])
    assert fill(manager, "b", [1, 2, 3, 4, 5]) == 0
    manager.free("a")
    manager.free("b")
    assert manager.groups[0].pool.num_cached_free == 0


def test_tables_and_hits_are_kept_per_layer_group() -> None:
    manager = BlockManager([PoolConfig(16), PoolConfig(8)], BLOCK, 64)
    fill(manager, "a", [1, 2, 3, 4, 5])
    assert fill(manager, "b", [1, 2, 3, 4, 5]) == 4
    assert manager.num_free_blocks == [12, 4]
    manager.groups[1].pool.withdraw(list(manager.groups[1].pool.index))
    assert manager.match(BlockHashes(BLOCK), [1, 2, 3, 4, 5]).num_tokens == 0
    assert manager.can_hold(7 * BLOCK)
    assert not manager.can_hold(7 * BLOCK + 1)
    counts = manager.counts()
    assert (counts.num_usable, counts.num_free, counts.num_shared, counts.usage) == (22, 16, 2, 3 / 7)


def test_the_checker_sees_a_wrong_count() -> None:
    manager = BlockManager([PoolConfig(8)], BLOCK, 64)
    fill(manager, "a", [1, 2, 3, 4, 5])
    manager.tables["a"][0].blocks[0].ref_count += 1
    with pytest.raises(InvariantViolation, match="is in 1 tables"):
        check(manager)
