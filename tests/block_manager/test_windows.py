"""Layers that see a window only: what is given back while a sequence runs, and what a prefix must still have."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.block_manager.check import check
from octavo.block_manager.config import PoolConfig
from octavo.block_manager.hashing import BlockHashes
from octavo.block_manager.manager import BlockManager, PrefixMisses

BLOCK = 4
FULL, WINDOWED = 0, 1


def make(window: int, *, full: int = 65, windowed: int = 33, max_step_tokens: int = 8) -> BlockManager:
    return BlockManager([PoolConfig(full), PoolConfig(windowed, window)], BLOCK, max_step_tokens)


def run(manager: BlockManager, seq_id: str, tokens: list[int], step: int = 1) -> int:
    """Admit and compute a sequence, `step` tokens at a time; returns the number of cached tokens."""
    hashes = BlockHashes(BLOCK)
    match = manager.match(hashes, tokens)
    manager.begin(seq_id, match, len(tokens))
    for before in range(match.num_tokens, len(tokens), step):
        after = min(before + step, len(tokens))
        manager.grow(seq_id, before, after)
        manager.publish(seq_id, hashes, tokens, after)
        manager.pass_window(seq_id, after)
        check(manager)
    return match.num_tokens


def held(manager: BlockManager, seq_id: str) -> list[int]:
    """Blocks of each group."""
    return [sum(block_id != 0 for block_id in ids) for ids in manager.block_ids(seq_id)]


def needed_by_hand(num_tokens: int, window: int) -> set[int]:
    """Blocks of computed tokens of which the token at position `num_tokens`, or one of the next, sees any: what lies in
    them already, or what it writes there itself."""
    last = (num_tokens - 1) // BLOCK
    seen = {key // BLOCK for key in range(max(0, num_tokens - window + 1), num_tokens + 1)}
    return {index for index in seen if index <= last}


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7, 8, 9, 12, 30])
@pytest.mark.parametrize("step", [1, 3, 8])
def test_exactly_what_a_later_token_sees_is_kept(window: int, step: int) -> None:
    manager = make(window)
    tokens = list(range(40))
    for length in range(1, 40):
        run(manager, "a", tokens[:length], step)
        full, windowed = manager.block_ids("a")
        assert 0 not in full
        assert {index for index, block_id in enumerate(windowed) if block_id} == needed_by_hand(length, window)
        assert len(windowed) == len(full)
        manager.free("a")
        assert manager.num_free_blocks == [64, 32]


@given(window=st.integers(1, 40), num_tokens=st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_no_sequence_holds_more_than_was_planned_for(window: int, num_tokens: int) -> None:
    group = make(window).groups[WINDOWED]
    # What a step that has been launched reads, and the token that it writes, span one token more than the window.
    blocks = -(-(num_tokens + 2) // BLOCK) - group.first_needed(num_tokens)
    assert blocks <= group.steady_blocks
    assert group.wanted_blocks == group.steady_blocks + 1


def test_a_long_sequence_takes_a_window_of_blocks() -> None:
    manager = make(10, windowed=7)
    run(manager, "a", [1] * 250)
    assert held(manager, "a") == [63, 3]
    assert manager.can_hold(10**6) is False
    assert make(10, full=10**4, windowed=5).can_hold(39000)
    assert not make(10, full=10**4, windowed=4).can_hold(39000)


def test_blocks_that_were_passed_stay_in_the_prefix_cache() -> None:
    manager = make(4)
    tokens = list(range(40))
    run(manager, "a", tokens)
    assert held(manager, "a") == [10, 1]
    assert manager.groups[WINDOWED].pool.num_cached_free == 9
    for length in (9, 21, 30, 41):
        assert manager.match(BlockHashes(BLOCK), [*tokens, 0][:length]).num_tokens == (length - 1) // BLOCK * BLOCK


def test_a_hit_needs_of_a_window_what_the_next_token_sees() -> None:
    manager = make(6)
    tokens = list(range(24))
    run(manager, "a", tokens)
    hashes = BlockHashes(BLOCK)
    hashes.extend(tokens, 24)
    pool = manager.groups[WINDOWED].pool

    def longest() -> int:
        return manager.match(BlockHashes(BLOCK), [*tokens, 0]).num_tokens

    assert longest() == 24
    pool.withdraw(hashes.hashes[:4])  # token 24 sees 19 to 24
    assert longest() == 24
    pool.withdraw([hashes.hashes[4]])
    assert longest() == 0  # nothing of the window is left for any shorter one
    manager.free("a")
    manager = make(6)
    run(manager, "a", tokens)
    manager.groups[WINDOWED].pool.withdraw([hashes.hashes[3]])
    match = manager.match(BlockHashes(BLOCK), tokens[:17])
    assert match.num_tokens == 12  # 16 would need blocks 2 and 3
    assert [len(blocks) for blocks in match.blocks] == [3, 2]
    manager.groups[FULL].pool.withdraw([hashes.hashes[1]])
    assert manager.match(BlockHashes(BLOCK), tokens[:17]).num_tokens == 4


def test_a_hit_takes_no_more_of_a_window_than_it_needs() -> None:
    manager = make(6)
    tokens = list(range(33))
    run(manager, "a", tokens)
    manager.free("a")
    free = manager.num_free_blocks
    match = manager.match(BlockHashes(BLOCK), tokens)
    assert manager.blocks_to_admit(match, 33) == [8 + 1, 2 + 1]
    manager.begin("b", match, 33)
    assert held(manager, "b") == [9, 2]
    manager.grow("b", 32, 33)
    assert [before - after for before, after in zip(free, manager.num_free_blocks, strict=True)] == [9, 3]
    assert manager.block_ids("b")[WINDOWED][:6] == [0] * 6
    check(manager)


def test_a_miss_is_explained_though_one_group_has_forgotten_it() -> None:
    manager = make(6, windowed=5)  # remembers 20 evictions
    tokens = list(range(16))
    run(manager, "a", tokens)
    manager.free("a")
    run(manager, "b", [7] * 120)
    assert not manager.groups[WINDOWED].pool.was_published(BlockHashes(BLOCK).root)
    hashes = BlockHashes(BLOCK)
    match = manager.match(hashes, [*tokens, 0])
    assert match.num_tokens == 0
    assert not any(manager.groups[WINDOWED].pool.was_published(one) for one in hashes.hashes)
    assert manager.explain_misses(hashes, 17, match) == PrefixMisses(0, 16, 1)
    manager.withdraw(hashes)
    assert manager.explain_misses(hashes, 17, match) == PrefixMisses(16, 0, 1)


def test_several_windows_agree_on_a_prefix() -> None:
    """The wide window ends it before the gap, where the narrow one has a gap of its own."""
    manager = BlockManager([PoolConfig(33, 4), PoolConfig(33, 12)], BLOCK, 8)
    tokens = list(range(32))
    run(manager, "a", tokens)
    hashes = BlockHashes(BLOCK)
    hashes.extend(tokens, 32)
    narrow, wide = (group.pool for group in manager.groups)
    wide.withdraw([hashes.hashes[6]])
    assert manager.match(BlockHashes(BLOCK), [*tokens, 0]).num_tokens == 24
    narrow.withdraw([hashes.hashes[5]])
    assert manager.match(BlockHashes(BLOCK), [*tokens, 0]).num_tokens == 20
    narrow.withdraw([hashes.hashes[4]])
    wide.withdraw([hashes.hashes[2]])
    assert manager.match(BlockHashes(BLOCK), [*tokens, 0]).num_tokens == 8


def test_samples_share_a_window_while_their_leader_still_has_it() -> None:
    manager = make(4)
    tokens = list(range(14))
    run(manager, "leader", tokens[:12])
    assert manager.can_fork("leader", 12)
    assert manager.can_fork("leader", 11)
    assert not manager.can_fork("leader", 10)  # the token there sees 7 to 10, and block 1 has been passed by
    manager.free("leader")
    hashes = BlockHashes(BLOCK)
    manager.begin("leader", manager.match(hashes, tokens), 14)
    manager.grow("leader", 12, 14)
    manager.fork("leader", "child", 13)
    (full, windowed) = manager.grow("child", 13, 14)
    assert (full.group, windowed.group) == (FULL, WINDOWED)
    manager.free("leader")
    check(manager)
    assert held(manager, "child") == [4, 2]


def test_a_prompt_s_part_is_cut_to_what_is_free() -> None:
    manager = make(6, windowed=6)
    manager.begin("a", manager.match(BlockHashes(BLOCK), [0]), 100)
    assert manager.blocks_owed("a", 100) == [0, 3]
    assert manager.tokens_with_room("a", 0, 50) == 20
    manager.grow("a", 0, 20)
    assert manager.tokens_with_room("a", 20, 50) == 20
    manager.pass_window("a", 20)
    assert manager.passes_next_at("a") == 21
    assert manager.tokens_with_room("a", 20, 50) == 32


def test_a_window_must_hold_a_token() -> None:
    with pytest.raises(ValueError, match="must hold a token"):
        BlockManager([PoolConfig(5, 0)], BLOCK, 1)
