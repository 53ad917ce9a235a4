"""Bugs of requests, blocks and their books, each of which the machine must see."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import engine_machine
import pytest
from octavo.block_manager.block import FreeBlockList
from octavo.block_manager.evicted import EvictedHashes
from octavo.block_manager.hashing import BlockHashes
from octavo.block_manager.manager import BlockManager, PrefixMatch
from octavo.block_manager.pool import BlockPool
from octavo.scheduler import scheduler as scheduler_module
from octavo.scheduler.batch import ScheduledBatch, StepResult
from octavo.scheduler.budget import StepBudget
from octavo.scheduler.progress import AdmissionStop
from octavo.scheduler.request import Request, RequestStatus
from octavo.scheduler.scheduler import Scheduler
from octavo.server.engine.core import EngineCore
from octavo.server.engine.execution import Execution
from octavo.server.engine.messages import StepStats
from oracle_runner import OracleRunner


def release_forgets_free_list(patch: pytest.MonkeyPatch) -> None:
    def release(self: BlockPool, blocks: Sequence[object]) -> None:
        for block in blocks:
            block.ref_count -= 1  # type: ignore[attr-defined]

    patch.setattr(BlockPool, "release", release)


def fork_forgets_references(patch: pytest.MonkeyPatch) -> None:
    def fork(self: BlockManager, parent_id: str, child_id: str, num_tokens: int) -> None:
        original(self, parent_id, child_id, num_tokens)
        for block in self.tables[child_id][0].blocks:
            block.ref_count -= 1

    original = BlockManager.fork
    patch.setattr(BlockManager, "fork", fork)


def no_copy_on_write(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "_written_foreign_block", lambda self, table, num_computed: None)


def copies_are_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OracleRunner, "copy_blocks", lambda self, copies: None)


def published_before_written(patch: pytest.MonkeyPatch) -> None:
    original = BlockManager.grow

    def grow(self: BlockManager, seq_id: str, num_computed: int, num_tokens: int) -> object:
        copies = original(self, seq_id, num_computed, num_tokens)
        hashes = BlockHashes(self.block_size)
        tokens = [1] * num_tokens
        self.publish(seq_id, hashes, tokens, num_tokens)
        return copies

    patch.setattr(BlockManager, "grow", grow)


def hit_covers_the_last_token(patch: pytest.MonkeyPatch) -> None:
    original = BlockManager.match

    def match(self: BlockManager, hashes: BlockHashes, token_ids: Sequence[int]) -> object:
        return original(self, hashes, [*token_ids, 0])

    patch.setattr(BlockManager, "match", match)


def salt_is_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("octavo.block_manager.hashing.root_hash", lambda salt: b"root")


def parent_is_not_hashed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("octavo.block_manager.hashing.chain_hash", lambda parent, tokens: sha256(tokens).digest())
    patch.setattr(BlockHashes, "parent", lambda self, index: b"")


def preemption_keeps_blocks(patch: pytest.MonkeyPatch) -> None:
    def preempt(self: Scheduler, request: Request) -> None:
        self.running.remove(request)
        request.num_computed_tokens = 0
        request.status = RequestStatus.WAITING
        self.waiting.push(request)

    patch.setattr(Scheduler, "_preempt", preempt)


def preemption_keeps_progress(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._preempt

    def preempt(self: Scheduler, request: Request) -> None:
        original(self, request)
        request.token_ids.append(0)

    patch.setattr(Scheduler, "_preempt", preempt)


def eviction_keeps_the_hash(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "_unpublish", lambda self, block: None)


def abort_leaks_held_samples(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._take_held

    def take_held(self: Scheduler, leader: Request) -> list[Request]:
        return [] if leader.status is RequestStatus.FINISHED else original(self, leader)

    patch.setattr(Scheduler, "_take_held", take_held)


def stop_is_checked_twice_late(patch: pytest.MonkeyPatch) -> None:
    original = scheduler_module.check_stop

    def check_stop(request: Request) -> object:
        return original(request) if request.num_output_tokens > 1 else None

    patch.setattr(scheduler_module, "check_stop", check_stop)


def budget_is_ignored_by_admissions(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler.schedule

    def schedule(self: Scheduler) -> ScheduledBatch:
        self.max_num_batched_tokens += 1
        try:
            return original(self)
        finally:
            self.max_num_batched_tokens -= 1

    patch.setattr(Scheduler, "schedule", schedule)


def lru_front_and_back_links(patch: pytest.MonkeyPatch) -> None:
    def remove(self: FreeBlockList, block: object) -> None:
        before, after = block.prev, block.next  # type: ignore[attr-defined]
        before.next = after
        block.prev = block.next = None  # type: ignore[attr-defined]
        self._length -= 1

    patch.setattr(FreeBlockList, "remove", remove)


def all_rows_are_blamed(patch: pytest.MonkeyPatch) -> None:
    def isolate(self: Execution, batch: ScheduledBatch, error: Exception) -> tuple[StepResult, dict[str, Exception]]:
        return StepResult([]), {row.seq_id: error for row in batch.rows}

    patch.setattr(Execution, "isolate", isolate)


def steps_that_will_not_run_count_as_computed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scheduler, "retract", lambda self, batch: None)


def nothing_is_ever_complete(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Request, "is_complete", False)


def retried_rows_miss_their_newest_token(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ScheduledBatch, "known", lambda self: self)
    patch.setattr(engine_machine, "ALWAYS_AHEAD", True)


def readmissions_are_queries(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._note_admission

    def note_admission(self: Scheduler, request: Request, match: PrefixMatch) -> None:
        num_preemptions, request.num_preemptions = request.num_preemptions, 0
        original(self, request, match)
        request.num_preemptions = num_preemptions

    patch.setattr(Scheduler, "_note_admission", note_admission)


def evictions_are_not_remembered(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EvictedHashes, "add", lambda self, block_hash: None)


def evictions_are_remembered_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EvictedHashes, "discard", lambda self, block_hash: None)


def misses_forget_the_tail(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "_num_matchable", lambda self, num_tokens: num_tokens // self.block_size)


def who_is_deferred_waits_for_capacity(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._admit_waiting

    def admit_waiting(self: Scheduler, budget: StepBudget) -> AdmissionStop:
        stop = original(self, budget)
        return AdmissionStop.CAPACITY if stop is AdmissionStop.BUDGET else stop

    patch.setattr(Scheduler, "_admit_waiting", admit_waiting)


def who_waits_for_capacity_is_deferred(patch: pytest.MonkeyPatch) -> None:
    original = Scheduler._admit_waiting

    def admit_waiting(self: Scheduler, budget: StepBudget) -> AdmissionStop:
        stop = original(self, budget)
        return AdmissionStop.BUDGET if stop is AdmissionStop.CAPACITY else stop

    patch.setattr(Scheduler, "_admit_waiting", admit_waiting)


def evictions_are_reported_twice(patch: pytest.MonkeyPatch) -> None:
    original = EngineCore.stats

    def stats(self: EngineCore, **fields: float) -> StepStats:
        self._num_evicted_reported = 0
        return original(self, **fields)

    patch.setattr(EngineCore, "stats", stats)


BUGS = [
    release_forgets_free_list,
    fork_forgets_references,
    no_copy_on_write,
    copies_are_lost,
    published_before_written,
    hit_covers_the_last_token,
    salt_is_ignored,
    parent_is_not_hashed,
    preemption_keeps_blocks,
    preemption_keeps_progress,
    eviction_keeps_the_hash,
    abort_leaks_held_samples,
    stop_is_checked_twice_late,
    budget_is_ignored_by_admissions,
    lru_front_and_back_links,
    all_rows_are_blamed,
    steps_that_will_not_run_count_as_computed,
    nothing_is_ever_complete,
    retried_rows_miss_their_newest_token,
    readmissions_are_queries,
    evictions_are_not_remembered,
    evictions_are_remembered_for_ever,
    misses_forget_the_tail,
    who_is_deferred_waits_for_capacity,
    who_waits_for_capacity_is_deferred,
    evictions_are_reported_twice,
]
