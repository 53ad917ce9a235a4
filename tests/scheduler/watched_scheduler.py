"""A scheduler that checks its own bookkeeping for the metrics against a slower account of the same events."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from octavo.block_manager.manager import PrefixMatch
from octavo.scheduler.batch import SampledRow, ScheduledBatch
from octavo.scheduler.budget import StepBudget
from octavo.scheduler.progress import AdmissionStop, Progress
from octavo.scheduler.request import Request, RequestStatus
from octavo.scheduler.scheduler import Scheduler


class OracleViolation(AssertionError):
    """What was found is not what the oracle knows to be so."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise OracleViolation(message)


def blocks_of_window(window: int, block_size: int) -> int:
    """What a token and the one behind it see lies in so many blocks, wherever it begins."""
    return max(len({(start + key) // block_size for key in range(window + 1)}) for start in range(block_size))


class WatchedScheduler(Scheduler):
    """Raises OracleViolation where misses, or what the queue waits for, are not told as they are."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.published: set[bytes] = set()
        """Hashes that were findable after some step, and were not withdrawn since."""
        self.evicted: list[set[bytes]] = [set() for _ in self.blocks.groups]
        """Those that each layer group ever lost again."""
        self.num_queries = 0
        """Tokens of the prompts that were admitted for the first time."""
        self.spare: list[int] = []
        """Blocks of each group that an admission could have had when the latest pass over the queue ended."""
        self.wanted: list[int] = []
        """Those that the first in the queue wanted then."""
        for group in self.blocks.groups:
            group.pool.withdraw = self._watched(group.pool.withdraw)  # type: ignore[method-assign]

    def _watched(self, withdraw: Callable[[Iterable[bytes]], None]) -> Callable[[Iterable[bytes]], None]:
        def watched(block_hashes: Iterable[bytes]) -> None:
            block_hashes = list(block_hashes)
            self.published -= set(block_hashes)
            withdraw(block_hashes)

        return watched

    @property
    def findable(self) -> list[set[bytes]]:
        """Hashes in the index of each layer group."""
        return [set(group.pool.index) for group in self.blocks.groups]

    def update(self, batch: ScheduledBatch, sampled: Sequence[SampledRow]) -> list[Progress]:
        progress = super().update(batch, sampled)
        self.published.update(*self.findable)
        self.judge_windows(batch)
        return progress

    def judge_windows(self, batch: ScheduledBatch) -> None:
        """Nobody holds more than the tokens to come see, nor less."""
        for row in batch.rows:
            if not self.holds(row):
                continue
            for group, table in zip(self.blocks.groups, row.block_ids, strict=True):
                num_passed = 0
                if group.window is not None:
                    num_passed = max(0, row.num_tokens_after - group.window + 1) // self.blocks.block_size
                require(not any(table[:num_passed]), "a block is held that nobody will read")
                require(all(table[num_passed:]), "a block was given back that somebody will read")

    def schedule(self) -> ScheduledBatch:
        num_preemptions = self.counters.num_preemptions
        num_evicted = self.blocks.counts().num_evicted
        before = self.findable
        batch = super().schedule()
        lost = [had - has for had, has in zip(before, self.findable, strict=True)]
        for evicted, more in zip(self.evicted, lost, strict=True):
            evicted |= more
        num_lost = sum(map(len, lost))
        require(self.blocks.counts().num_evicted - num_evicted == num_lost, "the count of evictions is off")
        self._judge_waiting(batch, preempted=self.counters.num_preemptions > num_preemptions)
        return batch

    def _admit_waiting(self, budget: StepBudget) -> AdmissionStop:
        stop = super()._admit_waiting(budget)
        # Now, because prompts under way take their blocks before the step is complete.
        self.spare = self._num_spare()
        first = self.waiting.peek()
        if first is not None:
            match = self.blocks.match(first.block_hashes, first.token_ids)
            self.wanted = self.blocks.blocks_to_admit(match, first.num_tokens)
        return stop

    def _num_spare(self) -> list[int]:
        """Blocks of each group that are free, less one for each that runs, and less what prompts under way take yet."""
        spare = []
        for index, group in enumerate(self.blocks.groups):
            left = group.pool.num_free - len(self.running)
            for request in self.running:
                if group.window is not None and request.num_tokens - request.num_computed_tokens > 1:
                    table = request.block_ids[index]
                    all_behind = -(-request.num_tokens // self.blocks.block_size) - table.count(0)
                    most = min(all_behind, blocks_of_window(group.window, self.blocks.block_size))
                    left -= max(0, most - sum(map(bool, table)))
            spare.append(left)
        return spare

    def _judge_waiting(self, batch: ScheduledBatch, *, preempted: bool) -> None:
        counts = self.waiting_counts
        require(counts.num_for_capacity + counts.num_deferred == self.num_waiting, "the reasons do not add up")
        first = min(self.waiting, key=lambda request: request.order, default=None)
        if first is None:
            require(counts.num_for_capacity == 0, "a held sample waits for its leader, not for capacity")
            return
        held = sum(
            sample.status is RequestStatus.HELD
            for samples in self.requests.values()
            for sample in samples.values()
            if not any(leader.status is RequestStatus.WAITING for leader in samples.values())
        )
        has_seat = len(self.running) < self.max_num_running
        if counts.num_for_capacity:
            require(counts.num_deferred == held, "samples are deferred in a pass that was short of room")
            if not preempted and has_seat:
                fits = all(more <= left for more, left in zip(self.wanted, self.spare, strict=True))
                require(not fits, "the first waits for room that is there")
        else:
            has_room = all(left > 0 for left in self.spare)
            require(has_seat and has_room, "the first is called deferred and has no room")
            require(batch.num_tokens == self.max_num_batched_tokens, "the first is called deferred, with tokens left")

    def _admit(self, request: Request, match: PrefixMatch) -> None:
        before = copy.copy(self.counters)
        # What this pass has lost so far belongs to the account too.
        for evicted, findable in zip(self.evicted, self.findable, strict=True):
            evicted |= self.published - findable
        counted = request.num_preemptions == 0 and request.sample_index == 0 and self.blocks.enable_prefix_caching
        expected = self._expected_misses(request, match) if counted else (0, 0, 0)
        super()._admit(request, match)
        now = self.counters
        queries = now.prefix_cache_queries - before.prefix_cache_queries
        new = now.prefix_misses_new - before.prefix_misses_new
        evicted = now.prefix_misses_evicted - before.prefix_misses_evicted
        tail = now.prefix_misses_tail - before.prefix_misses_tail
        if not counted:
            require((queries, new, evicted, tail) == (0, 0, 0, 0), "a readmission or a sibling is counted")
            return
        self.num_queries += request.num_prompt_tokens
        require(queries == request.num_prompt_tokens, "the queries are not the prompt")
        require(new + evicted == expected[0] + expected[1], "the misses before the tail are off")
        require(tail == expected[2], "the tail is off")
        # The memory of evictions is bounded: what it has forgotten counts as new.
        groups = zip(self.evicted, self.blocks.groups, strict=True)
        if any(len(evicted) <= group.pool.evicted.capacity for evicted, group in groups):
            require(evicted == expected[1], f"{evicted} tokens count as evicted instead of {expected[1]}")
        else:
            require(evicted <= expected[1], f"{evicted} tokens count as evicted, at most {expected[1]} were")

    def _expected_misses(self, request: Request, match: PrefixMatch) -> tuple[int, int, int]:
        """New, evicted and tail tokens."""
        size = self.blocks.block_size
        new = evicted = 0
        for end in range(match.num_tokens + size, request.num_tokens, size):
            if request.block_hashes.hashes[end // size - 1] in self.published:
                evicted += size
            else:
                new += size
        return new, evicted, request.num_tokens - match.num_tokens - new - evicted
