"""Random requests, aborts and failures against scheduler, block manager and engine core, over an oracle of the pool.

The fake runner stores in every K/V slot what a real one would have to find there (token, position, digest of the
prefix and its salt), and checks each read against the reading request's own history, in every layer group as far as
its window lets a token see. Tiny pools and a tiny alphabet make sharing, eviction, preemption and copy-on-write happen
all the time. What the metrics are told is checked as well:
see watched_scheduler.py, and `counters_add_up` here.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec import structs
from octavo.block_manager import check as invariants
from octavo.block_manager.block import Block, FreeBlockList
from octavo.block_manager.config import PoolConfig
from octavo.block_manager.evicted import EvictedHashes
from octavo.block_manager.group import BlockGroup
from octavo.block_manager.hashing import BlockHashes
from octavo.block_manager.manager import BlockManager, PrefixMatch
from octavo.block_manager.pool import BlockPool
from octavo.block_manager.table import BlockTable
from octavo.scheduler import scheduler as scheduler_module
from octavo.scheduler.batch import BlockCopy, PendingStep, SampledRow, ScheduledBatch, ScheduledRow, StepResult
from octavo.scheduler.budget import StepBudget
from octavo.scheduler.config import CacheConfig, SchedulerConfig
from octavo.scheduler.held_blocks import HeldBlocks
from octavo.scheduler.progress import AdmissionStop
from octavo.scheduler.request import Request, RequestStatus, derive_seed
from octavo.scheduler.sampling_params import SamplingParams
from octavo.scheduler.scheduler import Scheduler
from octavo.server.engine.core import EngineCore
from octavo.server.engine.execution import Execution
from octavo.server.engine.messages import GenerateRequest, StepStats, TokenOutput
from watched_scheduler import WatchedScheduler, blocks_of_window, require

# Every poisoned request is logged with its traceback, thousands of times here.
logging.getLogger("octavo.engine").setLevel(logging.CRITICAL)

COUNTED = (
    *("prefix_cache_queries", "prefix_cache_hits", "prefix_misses_new", "prefix_misses_evicted"),
    *("prefix_misses_tail", "num_evicted_blocks"),
)
ALPHABET = 3
EOS = 0


def digest(tokens: Sequence[int], salt: str) -> bytes:
    return sha256(f"{salt}|{list(tokens)}".encode()).digest()


def next_token(tokens: Sequence[int], seed: int) -> int:
    """What the oracle's model says after `tokens`: any deterministic function of history and seed."""
    return sha256(f"{seed}|{list(tokens)}".encode()).digest()[0] % ALPHABET


@dataclass
class BrokenStep:
    error: Exception

    def result(self) -> StepResult:
        raise self.error


class OracleRunner:
    """Executes batches over a dictionary of slots, and where it runs ahead, keeps what it drew until it is asked."""

    def __init__(self, block_size: int, windows: Sequence[int | None], runs_ahead: bool) -> None:
        self.block_size = block_size
        self.windows = windows
        """Of each layer group."""
        self.runs_ahead = runs_ahead
        self.drawn: dict[str, int] = {}
        """What the latest step drew for each sequence: all that the next one may know of it."""
        self.slots: dict[tuple[int, int, int], tuple[int, int, bytes]] = {}
        """(layer group, block, offset) → what was written there."""
        self.salts: dict[str, str] = {}
        self.poisoned: set[str] = set()
        self.manager: BlockManager | None = None
        self.budget = 0
        self.known: set[str] = set()

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        for copy in copies:
            for offset in range(self.block_size):
                content = self.slots.get((copy.group, copy.source, offset))
                if content is None:
                    self.slots.pop((copy.group, copy.target, offset), None)
                else:
                    self.slots[copy.group, copy.target, offset] = content

    def launch(self, batch: ScheduledBatch) -> PendingStep:
        require(self.runs_ahead or not any(row.num_unknown_tokens for row in batch.rows), "a token is not known")
        rows = [self._complete(row) for row in batch.rows]
        try:
            result = self._execute(replace(batch, rows=rows))
        except RuntimeError as error:
            if not self.runs_ahead:
                raise
            self.drawn = {row.seq_id: 0 for row in rows if row.draws_token}  # what a broken step leaves behind
            return BrokenStep(error)
        self.drawn = {row.seq_id: row.token_ids[0] for row in result.sampled}
        return result

    def _complete(self, row: ScheduledRow) -> ScheduledRow:
        """The row with the token that only this runner knows."""
        if not row.num_unknown_tokens:
            return row
        return structs.replace(row, token_ids=[*row.token_ids, self.drawn[row.seq_id]], num_unknown_tokens=0)

    def _execute(self, batch: ScheduledBatch) -> StepResult:
        require(batch.num_tokens <= self.budget, "the step exceeds its token budget")
        counts = [row.num_scheduled_tokens for row in batch.rows]
        require(all(count == 1 for count in counts[: batch.num_decode_rows]), "a decode row has several tokens")
        require(all(count > 1 for count in counts[batch.num_decode_rows :]), "decode rows are not first")
        require(len({row.seq_id for row in batch.rows}) == len(batch.rows), "a sequence is scheduled twice")
        for row in batch.rows:
            if row.seq_id.rpartition("/")[0] in self.poisoned:
                raise RuntimeError("poisoned")
        for act in (self._write, self._read):
            for row in batch.rows:
                for group in range(len(self.windows)):
                    act(row, group)
        self.known.update(row.seq_id for row in batch.rows)
        return StepResult(
            [SampledRow(row.seq_id, [next_token(row.token_ids, row.seed)]) for row in batch.rows if row.draws_token]
        )

    def release(self, seq_ids: Sequence[str]) -> None:
        self.known.difference_update(seq_ids)

    def _locate(self, row: ScheduledRow, group: int, position: int) -> tuple[int, int, int]:
        block_id = row.block_ids[group][position // self.block_size]
        require(block_id != 0, f"position {position} of {row.seq_id} is in the reserved block")
        return group, block_id, position % self.block_size

    def _write(self, row: ScheduledRow, group: int) -> None:
        assert self.manager is not None
        salt = self.salts[row.seq_id.rpartition("/")[0]]
        for position in range(row.num_computed_tokens, row.num_tokens_after):
            place = self._locate(row, group, position)
            block = self.manager.groups[group].pool.blocks[place[1]]
            require(block.ref_count == 1, f"{block!r} is written while shared")
            require(block.hash is None, f"{block!r} is written while published")
            prefix = row.token_ids[: position + 1]
            self.slots[place] = (row.token_ids[position], position, digest(prefix, salt))

    def _read(self, row: ScheduledRow, group: int) -> None:
        salt = self.salts[row.seq_id.rpartition("/")[0]]
        window = self.windows[group]
        first = 0 if window is None else max(0, row.num_computed_tokens - window + 1)
        for position in range(first, row.num_tokens_after):
            found = self.slots.get(self._locate(row, group, position))
            expected = (row.token_ids[position], position, digest(row.token_ids[: position + 1], salt))
            require(found == expected, f"{row.seq_id} reads foreign or missing K/V at position {position}")


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[PoolConfig], int]:
    """A block size, pools for some layer groups, and the longest sequence that they hold."""
    block_size = draw(st.integers(2, 4))
    kinds = [[None], [None], [None, 1], [1], [None, 1, 1]]  # 1: some window
    windows = [kind and draw(st.integers(1, 11)) for kind in draw(st.sampled_from(kinds))]
    num_blocks = draw(st.integers(3, 11))
    capacity = num_blocks * block_size
    pools = []
    for window in windows:
        least = num_blocks if window is None else min(num_blocks, blocks_of_window(window, block_size))
        more = 0 if window is None else draw(st.integers(0, 5))
        pools.append(PoolConfig(least + more + 1, window))
    return block_size, pools, capacity


@dataclass
class Submitted:
    """What the machine knows of a request it sent."""

    request: GenerateRequest
    max_total: int
    outputs: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    error: str | None = None
    gone: set[int] = field(default_factory=set)
    """Samples that were aborted."""

    def expected(self, seed: int, sample: int) -> tuple[list[int], str]:
        params = self.request.params
        tokens = list(self.request.prompt_token_ids)
        output: list[int] = []
        while True:
            token = next_token(tokens, derive_seed(seed, sample))
            tokens.append(token)
            output.append(token)
            stops = token in params.stop_token_ids or (token == EOS and not params.ignore_eos)
            if len(output) >= params.min_tokens and stops:
                return output, "stop"
            if len(tokens) >= self.max_total:
                return output, "length"


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        layout=layouts(),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(1, 9),
        caching=st.booleans(),
        max_waiting=st.integers(0, 6),
        runs_ahead=st.booleans(),
    )
    def start(
        self,
        layout: tuple[int, list[PoolConfig], int],
        max_num_seqs: int,
        budget: int,
        caching: bool,
        max_waiting: int,
        runs_ahead: bool,
    ) -> None:
        block_size, pools, self.capacity = layout
        self.max_waiting, self.max_num_seqs = max_waiting, max_num_seqs
        self.runner = OracleRunner(block_size, [pool.window for pool in pools], runs_ahead)
        self.scheduler = WatchedScheduler(
            SchedulerConfig(max_num_seqs=max_num_seqs, max_num_waiting=max_waiting),
            CacheConfig(block_size=block_size, enable_prefix_caching=caching),
            pools=pools,
            max_model_len=self.capacity,
            max_num_batched_tokens=budget,
            eos_token_ids=(EOS,),
        )
        self.runner.manager = self.scheduler.blocks
        self.runner.budget = budget
        self.core = EngineCore(self.scheduler, self.runner)
        self.sent: dict[str, Submitted] = {}
        self.work = 0
        self.reported = dict.fromkeys(COUNTED, 0)

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        prompts = st.lists(st.integers(0, ALPHABET - 1), min_size=1, max_size=self.capacity)
        if self.sent:  # what was evicted is asked for again
            prompts |= st.sampled_from([sent.request.prompt_token_ids for sent in self.sent.values()])
        prompt = data.draw(prompts, label="prompt")
        max_tokens = data.draw(st.none() | st.integers(1, self.capacity), label="max_tokens")
        params = SamplingParams(
            n=data.draw(st.sampled_from([1, 1, 1, 2, 3]), label="n"),
            seed=data.draw(st.integers(0, 3), label="seed"),
            max_tokens=max_tokens,
            min_tokens=data.draw(st.integers(0, 3 if max_tokens is None else min(3, max_tokens)), label="min"),
            ignore_eos=data.draw(st.booleans(), label="ignore_eos"),
            stop_token_ids=data.draw(st.sampled_from([(), (), (1,)]), label="stop"),
        )
        request = GenerateRequest(
            request_id=f"r{len(self.sent)}",
            prompt_token_ids=prompt,
            params=params,
            priority=data.draw(st.integers(0, 1), label="priority"),
            cache_salt=data.draw(st.sampled_from(["", "", "other"]), label="salt"),
        )
        max_total = min(self.capacity, len(prompt) + (max_tokens or self.capacity))
        self.sent[request.request_id] = Submitted(request, max_total)
        self.runner.salts[request.request_id] = request.cache_salt
        self.work += params.n * max_total
        self.core.add(request)

    @rule()
    def step(self) -> None:
        if self.core.has_work:
            had_rows = self.scheduler.has_work
            output = self.core.step()
            require(output.stats.num_scheduled_tokens > 0 or not had_rows, "a step with work did nothing")
            self.count(output.stats)
            for token_output in output.outputs:
                self.take(token_output)

    def count(self, stats: StepStats) -> None:
        for name in self.reported:
            self.reported[name] += getattr(stats, name)
        require(0 <= stats.num_waiting_deferred <= stats.num_waiting, "more are deferred than wait")

    @precondition(lambda self: getattr(self, "scheduler", None) and self.scheduler.requests)
    @rule(data=st.data(), whole=st.booleans())
    def abort(self, data: st.DataObject, whole: bool) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.scheduler.requests)), label="request")
        samples = self.scheduler.requests[request_id]
        sample = None if whole else data.draw(st.sampled_from(sorted(samples)), label="sample")
        self.sent[request_id].gone.update(list(samples) if sample is None else [sample])
        self.core.abort(request_id, sample)

    @precondition(lambda self: getattr(self, "scheduler", None) and self.scheduler.requests)
    @rule(data=st.data())
    def poison(self, data: st.DataObject) -> None:
        self.runner.poisoned.add(data.draw(st.sampled_from(sorted(self.scheduler.requests)), label="request"))

    def take(self, output: TokenOutput) -> None:
        sent = self.sent[output.request_id]
        if output.error is not None:
            require(sent.error is None, "a request failed twice")
            sent.error = output.error.code
            if sent.error == "internal_error":
                require(output.request_id in self.runner.poisoned, "an innocent request was blamed")
            return
        require(sent.error is None, "output after an error")
        require(output.sample_index not in sent.gone, "output after an abort")
        require(output.sample_index not in sent.ends, "output after the end")
        sent.outputs.setdefault(output.sample_index, []).extend(output.token_ids)
        if output.finish_reason is not None:
            sent.ends[output.sample_index] = output.finish_reason

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        invariants.check(scheduler.blocks)
        live = [request for samples in scheduler.requests.values() for request in samples.values()]
        running = [request.seq_id for request in live if request.status is RequestStatus.RUNNING]
        require(sorted(running) == sorted(r.seq_id for r in scheduler.running), "the running list is off")
        require(len(set(running)) == len(running) <= self.max_num_seqs, "too many are running")
        require(set(scheduler.blocks.tables) == set(running), "blocks are held by a sequence that does not run")
        waiting = {request.seq_id for request in live if request.status is RequestStatus.WAITING}
        require(waiting == {request.seq_id for request in scheduler.waiting}, "the waiting queue is off")
        held = [request for request in live if request.status is RequestStatus.HELD]
        require(scheduler.num_waiting == len(waiting) + len(held), "the count of waiting sequences is off")
        require(not any(request.status is RequestStatus.FINISHED for request in live), "a finished request lives on")

    @invariant()
    def counters_add_up(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        told, counters = self.reported, self.scheduler.counters
        misses = told["prefix_misses_new"] + told["prefix_misses_evicted"] + told["prefix_misses_tail"]
        require(
            told["prefix_cache_queries"] == told["prefix_cache_hits"] + misses, "hits and misses are not all queries"
        )
        require(told["prefix_cache_queries"] == self.scheduler.num_queries, "the queries are not the prompts admitted")
        for name in COUNTED[:-1]:
            require(told[name] == getattr(counters, name), f"{name} is reported twice, or not at all")
        require(
            told["num_evicted_blocks"] == self.scheduler.blocks.counts().num_evicted, "evictions are not all reported"
        )

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        # Under FCFS somebody always advances; recomputation is the only work beyond what was asked for.
        for _ in range(20 + 20 * self.work):
            if not self.core.has_work:
                break
            self.step()
            self.books_balance()
            self.counters_add_up()
        require(not self.core.has_work, "requests are not served within the bound")
        self.core.idle()
        counts = self.scheduler.blocks.counts()
        require(counts.num_free == counts.num_usable, "blocks are lost")
        require(not self.scheduler.requests and not self.scheduler.running, "requests are left over")
        require(not self.runner.known, "the runner keeps state of ended sequences")
        arrival = 0
        for sent in self.sent.values():
            if sent.error != "queue_full":
                arrival += 1
            self.judge(sent)

    def judge(self, sent: Submitted) -> None:
        params = sent.request.params
        if sent.error is not None:
            require(sent.error in ("queue_full", "internal_error"), f"unexpected error {sent.error}")
            return
        assert params.seed is not None
        for sample in range(params.n):
            expected, reason = sent.expected(params.seed, sample)
            got = sent.outputs.get(sample, [])
            if sample in sent.gone:
                require(expected[: len(got)] == got, "an aborted sample had said something wrong")
                continue
            require(got == expected, f"{sent.request.request_id}/{sample} said {got} instead of {expected}")
            require(sent.ends.get(sample) == reason, "the finish reason is wrong")


# 2,000 examples of 60 steps are the goal of a nightly run (OCTAVO_FUZZ_EXAMPLES=2000); the suite takes a sample.
EXAMPLES = int(os.environ.get("OCTAVO_FUZZ_EXAMPLES", "150"))
EngineMachine.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    # Shrinking a failure takes minutes; ask for it when there is one to look at.
    phases=list(Phase) if os.environ.get("OCTAVO_FUZZ_SHRINK") else [Phase.explicit, Phase.reuse, Phase.generate],
)
test_engine_survives_anything = EngineMachine.TestCase


# ---------------------------------------------------------------------- seeded bugs: the machine must see each of them


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


SEEDED_BUGS = [
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


@pytest.mark.parametrize("bug", SEEDED_BUGS, ids=lambda bug: bug.__name__)
def test_seeded_bug_is_caught(bug: object, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)  # type: ignore[operator]
    search = settings(
        max_examples=1000,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises(Exception):  # noqa: B017, PT011 - whichever check sees it first
        run_state_machine_as_test(EngineMachine, settings=search)
