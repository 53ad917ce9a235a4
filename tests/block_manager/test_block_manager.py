"""Blocks, prefix chain and tables by themselves; the state machine in tests/scheduler drives them all together."""

from __future__ import annotations

import pytest
from octavo.block_manager.block import Block, FreeBlockList
from octavo.block_manager.check import InvariantViolation, check
from octavo.block_manager.hashing import BlockHashes, chain_hash, root_hash, token_bytes
from octavo.block_manager.manager import BlockManager
from octavo.block_manager.pool import BlockPool, OutOfBlocks

BLOCK = 4


def fill(manager: BlockManager, seq_id: str, tokens: list[int], salt: str = "") -> int:
    """Admit, compute and publish a sequence; returns the number of cached tokens."""
    hashes = BlockHashes(manager.block_size, salt)
    match = manager.match(hashes, tokens)
    manager.begin(seq_id, match)
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
    manager = BlockManager(16, BLOCK)
    assert fill(manager, "a", [1, 2, 3, 4, 5, 6, 7, 8]) == 0
    assert fill(manager, "b", [1, 2, 3, 4, 5, 6, 7, 8]) == 4
    assert fill(manager, "c", [1, 2, 3, 4, 5, 6, 7, 8, 9]) == 8
    assert fill(manager, "d", [1, 2, 3, 4, 0, 6, 7, 8, 9]) == 4
    assert fill(manager, "e", [1, 2, 3, 4, 5, 6, 7, 8, 9], salt="other") == 0
    assert manager.pool.num_shared == 2


def test_freed_prefixes_are_found_until_their_blocks_are_needed() -> None:
    manager = BlockManager(5, BLOCK)
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    fill(manager, "a", tokens)
    manager.free("a")
    assert manager.pool.num_free == 4
    assert manager.pool.num_cached_free == 2
    assert fill(manager, "b", tokens) == 8
    manager.free("b")
    # Blocks without a hash go first, then the end of the prefix, its beginning last.
    fill(manager, "c", [0] * 12)
    manager.free("c")
    assert manager.match(BlockHashes(BLOCK), tokens).num_tokens == 4


def test_a_colliding_hash_is_no_hit_when_the_tokens_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.block_manager.hashing.chain_hash", lambda parent, tokens: b"same")
    manager = BlockManager(8, BLOCK)
    fill(manager, "a", [1, 2, 3, 4, 5])
    assert manager.match(BlockHashes(BLOCK), [1, 2, 3, 4, 5]).num_tokens == 4
    assert manager.match(BlockHashes(BLOCK), [9, 2, 3, 4, 5]).num_tokens == 0
    assert manager.match(BlockHashes(BLOCK, "salt"), [1, 2, 3, 4, 5]).num_tokens == 0


def test_a_forked_sequence_copies_before_it_writes() -> None:
    manager = BlockManager(16, BLOCK)
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
    manager = BlockManager(16, BLOCK)
    fill(manager, "leader", [1, 2, 3, 4])
    manager.fork("leader", "child", 3)
    manager.free("leader")
    (copy,) = manager.grow("child", 3, 4)
    assert manager.pool.blocks[copy.target].hash is None
    assert manager.pool.blocks[copy.source].hash is not None
    check(manager)


def test_growing_beyond_the_pool_changes_nothing() -> None:
    manager = BlockManager(4, BLOCK)
    fill(manager, "a", [1] * 8)
    before = list(manager.block_ids("a")[0])
    with pytest.raises(OutOfBlocks):
        manager.grow("a", 8, 17)
    assert manager.block_ids("a")[0] == before
    check(manager)


def test_without_prefix_caching_nothing_is_published() -> None:
    manager = BlockManager(8, BLOCK, enable_prefix_caching=False)
    fill(manager, "a", [1, 2, 3, 4, 5])
    assert fill(manager, "b", [1, 2, 3, 4, 5]) == 0
    manager.free("a")
    manager.free("b")
    assert manager.pool.num_cached_free == 0


def test_tables_and_hits_are_kept_per_layer_group() -> None:
    manager = BlockManager(16, BLOCK, num_groups=2)
    fill(manager, "a", [1, 2, 3, 4, 5])
    first, second = manager.block_ids("a")
    assert set(first).isdisjoint(second)
    assert fill(manager, "b", [1, 2, 3, 4, 5]) == 4
    assert manager.capacity_tokens == 7 * BLOCK


def test_the_checker_sees_a_wrong_count() -> None:
    manager = BlockManager(8, BLOCK)
    fill(manager, "a", [1, 2, 3, 4, 5])
    manager.tables["a"][0].blocks[0].ref_count += 1
    with pytest.raises(InvariantViolation, match="is in 1 tables"):
        check(manager)
