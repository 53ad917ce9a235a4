"""A scheduler that checks its own bookkeeping for the metrics against a slower account of the same events."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from octavo.block_manager.block import Block
from octavo.block_manager.manager import PrefixMatch
from octavo.scheduler.batch import SampledRow, ScheduledBatch
from octavo.scheduler.progress import Progress
from octavo.scheduler.request import Request, RequestStatus
from octavo.scheduler.scheduler import Scheduler


class OracleViolation(AssertionError):
    """What was found is not what the oracle knows to be so."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise OracleViolation(message)


class WatchedScheduler(Scheduler):
    """Raises OracleViolation where misses, or what the queue waits for, are not told as they are."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.published: set[bytes] = set()
        """Hashes that were findable after some step, and were not withdrawn since."""
        self.evicted: set[bytes] = set()
        """Those that were ever lost again."""
        self.num_queries = 0
        """Tokens of the prompts that were admitted for the first time."""
        unpublish = self.blocks.pool.unpublish

        def withdraw(blocks: Iterable[Block]) -> None:
            blocks = list(blocks)
            self.published -= {block.hash for block in blocks if block.hash is not None}
            unpublish(blocks)

        self.blocks.pool.unpublish = withdraw  # type: ignore[method-assign]

    def update(self, batch: ScheduledBatch, sampled: Sequence[SampledRow]) -> list[Progress]:
        progress = super().update(batch, sampled)
        self.published.update(self.blocks.pool.index[0])
        return progress

    def schedule(self) -> ScheduledBatch:
        num_preemptions = self.counters.num_preemptions
        num_evicted = self.blocks.pool.num_evicted
        findable = set(self.blocks.pool.index[0])
        batch = super().schedule()
        lost = findable - set(self.blocks.pool.index[0])
        self.evicted |= lost
        require(self.blocks.pool.num_evicted - num_evicted == len(lost), "the count of evictions is off")
        self._judge_waiting(batch, preempted=self.counters.num_preemptions > num_preemptions)
        return batch

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
        num_spare = self.blocks.num_free_blocks - len(self.running)
        if counts.num_for_capacity:
            require(counts.num_deferred == held, "samples are deferred in a pass that was short of room")
            needed = self.blocks.blocks_to_admit(
                self.blocks.match(first.block_hashes, first.token_ids), first.num_tokens
            )
            require(preempted or not has_seat or needed > num_spare, "the first waits for room that is there")
        else:
            require(has_seat and num_spare > 0, "the first is called deferred and has no room")
            require(batch.num_tokens == self.max_num_batched_tokens, "the first is called deferred, with tokens left")

    def _admit(self, request: Request, match: PrefixMatch) -> None:
        before = copy.copy(self.counters)
        # What this pass has lost so far belongs to the account too.
        self.evicted |= self.published - set(self.blocks.pool.index[0])
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
        if len(self.evicted) <= self.blocks.pool.evicted[0].capacity:
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
