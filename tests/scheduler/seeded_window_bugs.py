"""Bugs of windows, each of which the machine must see."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import engine_machine
import pytest
from octavo.block_manager.block import Block
from octavo.block_manager.group import BlockGroup
from octavo.block_manager.hashing import BlockHashes
from octavo.block_manager.manager import BlockManager, PrefixMatch
from octavo.block_manager.table import BlockTable
from octavo.scheduler.budget import StepBudget
from octavo.scheduler.held_blocks import HeldBlocks
from octavo.scheduler.request import Request
from octavo.scheduler.scheduler import Scheduler
from watched_scheduler import WatchedScheduler


def first_needed_off_by(num_tokens: int) -> Callable[[BlockGroup, int], int]:
    """`BlockGroup.first_needed` for a window that is so many tokens shorter."""

    def first_needed(self: BlockGroup, position: int) -> int:
        if self.window is None:
            return 0
        return max(0, position + 1 - self.window + num_tokens) // self._block_size

    return first_needed


def a_token_too_few_is_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockGroup, "first_needed", first_needed_off_by(1))


def a_block_too_few_is_kept(patch: pytest.MonkeyPatch) -> None:
    original = BlockManager.pass_window

    def pass_window(self: BlockManager, seq_id: str, num_tokens: int) -> None:
        original(self, seq_id, num_tokens + self.block_size)

    patch.setattr(BlockManager, "pass_window", pass_window)


def a_block_too_many_is_kept(patch: pytest.MonkeyPatch) -> None:
    original = BlockManager.pass_window

    def pass_window(self: BlockManager, seq_id: str, num_tokens: int) -> None:
        original(self, seq_id, num_tokens - self.block_size)

    patch.setattr(BlockManager, "pass_window", pass_window)


def a_token_too_many_is_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockGroup, "first_needed", first_needed_off_by(-1))


def windows_never_pass(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "passes_next_at", lambda self, seq_id: sys.maxsize)


def windows_pass_what_a_running_step_reads(patch: pytest.MonkeyPatch) -> None:
    original = HeldBlocks.pass_window

    def pass_window(self: HeldBlocks, request: Request, num_tokens: int) -> None:
        original(self, request, request.num_computed_tokens)

    patch.setattr(HeldBlocks, "pass_window", pass_window)
    patch.setattr(WatchedScheduler, "judge_windows", lambda self, batch: None)
    patch.setattr(engine_machine, "ALWAYS_AHEAD", True)


def hits_ignore_windows(patch: pytest.MonkeyPatch) -> None:
    original = BlockGroup.longest_match

    def longest_match(self: BlockGroup, hashes: BlockHashes, limit: int) -> int:
        return limit if self.window is not None else original(self, hashes, limit)

    def match(self: BlockManager, hashes: BlockHashes, token_ids: Sequence[int]) -> PrefixMatch:
        hashes.extend(token_ids, len(token_ids))
        count = self._longest_match(hashes, self._num_matchable(len(token_ids)))
        if not self.enable_prefix_caching:
            count = 0
        blocks = tuple(
            tuple(group.pool.index[block_hash] for block_hash in hashes.hashes[:count]) if group.window is None else ()
            for group in self.groups
        )
        return PrefixMatch(blocks, count * self.block_size)

    patch.setattr(BlockGroup, "longest_match", longest_match)
    patch.setattr(BlockManager, "match", match)


def hits_want_a_token_too_few(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "match", with_window_off_by(BlockManager.match, 1))


def with_window_off_by(function: Callable[..., Any], num_tokens: int) -> Callable[..., Any]:
    """The function, with windows that much shorter while it runs."""

    def changed(self: BlockManager, *arguments: Any) -> Any:
        original = BlockGroup.first_needed
        BlockGroup.first_needed = first_needed_off_by(num_tokens)  # type: ignore[method-assign]
        try:
            return function(self, *arguments)
        finally:
            BlockGroup.first_needed = original  # type: ignore[method-assign]

    return changed


def passed_entries_leave_the_table(patch: pytest.MonkeyPatch) -> None:
    def pass_by(self: BlockTable, num_passed: int, null: Block) -> list[Block]:
        count = num_passed - self.num_passed
        passed = self.blocks[self.num_passed : num_passed]
        del self.blocks[self.num_passed : num_passed]
        self.blocks[:0] = [null] * (count - 1)
        self.ids[:] = [block.id for block in self.blocks]
        self.num_passed = num_passed
        return passed

    patch.setattr(BlockTable, "pass_by", pass_by)


def samples_take_a_window_that_has_passed(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._fork_siblings

    def fork_siblings(self: Scheduler, leader: Request) -> None:
        self.blocks.pass_window(leader.seq_id, leader.num_prompt_tokens)
        original(self, leader)

    patch.setattr(Scheduler, "_fork_siblings", fork_siblings)
    patch.setattr(BlockManager, "can_fork", lambda self, parent_id, num_tokens: True)


def prompts_are_given_room_that_is_not_there(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "tokens_with_room", lambda self, seq_id, num_computed, num_tokens: num_tokens)


def prompts_are_preempted_while_a_step_would_make_room(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._serve

    def serve(self: Scheduler, prompts: list[Request], budget: StepBudget, *, alone: bool) -> None:
        num_in_flight, self._num_in_flight = self._num_in_flight, 0
        original(self, prompts, budget, alone=alone)
        self._num_in_flight = num_in_flight

    patch.setattr(Scheduler, "_serve", serve)
    patch.setattr(engine_machine, "ALWAYS_AHEAD", True)


WINDOW_BUGS = [
    a_token_too_few_is_kept,
    a_block_too_few_is_kept,
    a_block_too_many_is_kept,
    a_token_too_many_is_kept,
    windows_never_pass,
    windows_pass_what_a_running_step_reads,
    hits_ignore_windows,
    hits_want_a_token_too_few,
    passed_entries_leave_the_table,
    samples_take_a_window_that_has_passed,
    prompts_are_given_room_that_is_not_there,
    prompts_are_preempted_while_a_step_would_make_room,
]
