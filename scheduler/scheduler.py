"""Continuous batching: each step, which sequences compute how many of their tokens.

There is no prefill mode and no decode mode. `num_computed_tokens` of each request chases `num_tokens` under one
token budget (the idea is vLLM's); chunked prefill, prefix hits, parallel samples and preemption by recompute all
fall out of that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ..block_manager.manager import BlockManager, PrefixMatch
from .batch import BlockCopy, SampledRow, ScheduledBatch, ScheduledRow
from .budget import StepBudget
from .config import CacheConfig, SchedulerConfig
from .progress import AdmissionStop, Progress, SchedulerCounters, WaitingCounts
from .queue import WaitingQueue
from .request import Request, RequestStatus
from .sampling_params import SamplingParams
from .stop import Stop, check_stop


class QueueFull(Exception):
    """The waiting queue holds as much as it may: try again later."""


class Scheduler:
    """Owner of all requests between arrival and end, and of the block manager. Pure Python, no torch."""

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheConfig,
        *,
        num_blocks: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        eos_token_ids: Sequence[int] = (),
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`num_blocks` counts the reserved block 0; `max_model_len` must fit into the rest (ValueError)."""
        self.blocks = BlockManager(num_blocks, cache.block_size, enable_prefix_caching=cache.enable_prefix_caching)
        if max_model_len > self.blocks.capacity_tokens:
            raise ValueError(f"a sequence of {max_model_len} tokens does not fit into {num_blocks - 1} blocks")
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        # So that decodes alone never exceed the budget.
        self.max_num_running = min(config.max_num_seqs, max_num_batched_tokens)
        self._max_num_waiting = config.max_num_waiting
        self._eos_token_ids = tuple(eos_token_ids)
        self._seed = seed
        self._clock = clock
        self.waiting = WaitingQueue()
        self.running: list[Request] = []
        self.requests: dict[str, dict[int, Request]] = {}
        """request id → sample index → live sample."""
        self.counters = SchedulerCounters()
        self._admission_stop = AdmissionStop.QUEUE_EMPTY
        """Of the latest pass."""
        self._num_held = 0
        self._num_arrived = 0
        self._finished_seq_ids: list[str] = []

    # ------------------------------------------------------------------ arrival and departure

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + self._num_held

    @property
    def waiting_counts(self) -> WaitingCounts:
        """Who waits for what, as the latest pass left it; together they are `num_waiting`.

        Who came since then has not been looked at yet, and counts like the rest of the queue. A held sample waits
        with its leader, or, once that one runs, for the prompt that it computes.
        """
        num_held_by_running = sum(len(leader.held_siblings) for leader in self.running) if self._num_held else 0
        num_queued = self.num_waiting - num_held_by_running
        if self._admission_stop is AdmissionStop.CAPACITY:
            return WaitingCounts(num_queued, num_held_by_running)
        return WaitingCounts(0, num_queued + num_held_by_running)

    @property
    def has_work(self) -> bool:
        return bool(self.running) or len(self.waiting) > 0

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        arrival_time: float | None = None,
    ) -> None:
        """Queue a request with all its samples. Raises QueueFull, and ValueError for one that can never run."""
        if request_id in self.requests:
            raise ValueError(f"request id {request_id} is in use")
        if not 0 < len(prompt_token_ids) <= self.max_model_len:
            raise ValueError(f"a prompt of {len(prompt_token_ids)} tokens; possible are 1 to {self.max_model_len}")
        free_seats = max(0, self.max_num_running - len(self.running))
        if self.num_waiting + params.n > self._max_num_waiting + free_seats:
            raise QueueFull(f"{self.num_waiting} sequences are waiting already")
        self._num_arrived += 1
        max_tokens = self.max_model_len if params.max_tokens is None else params.max_tokens
        samples = [
            Request(
                request_id,
                sample_index,
                prompt_token_ids,
                params,
                seed=self._seed + self._num_arrived if params.seed is None else params.seed,
                order=(priority, self._num_arrived, sample_index),
                max_total_tokens=min(self.max_model_len, len(prompt_token_ids) + max_tokens),
                block_size=self.blocks.block_size,
                cache_salt=cache_salt,
                arrival_time=self._clock() if arrival_time is None else arrival_time,
            )
            for sample_index in range(params.n)
        ]
        self.requests[request_id] = {sample.sample_index: sample for sample in samples}
        leader, siblings = samples[0], samples[1:]
        for sibling in siblings:
            sibling.status = RequestStatus.HELD
        leader.held_siblings = siblings
        self._num_held += len(siblings)
        self.waiting.push(leader)

    def abort(self, request_id: str, sample_index: int | None = None) -> list[Request]:
        """End a request, or one sample of it, at any moment; returns what was ended. Unknown ids are ignored."""
        samples = self.requests.get(request_id, {})
        ended = list(samples.values()) if sample_index is None else [s for i, s in samples.items() if i == sample_index]
        # Held siblings first: ending the leader would otherwise send them to the queue.
        for request in sorted(ended, key=lambda r: r.status is not RequestStatus.HELD):
            self._end(request)
        return ended

    def _end(self, request: Request) -> None:
        """The one way out: whatever the request holds is given back."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self.blocks.free(request.seq_id)
        elif request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        elif request.status is RequestStatus.HELD:
            self._num_held -= 1
            leader = next(r for r in self.requests[request.request_id].values() if request in r.held_siblings)
            leader.held_siblings.remove(request)
        request.status = RequestStatus.FINISHED
        self._finished_seq_ids.append(request.seq_id)
        for sibling in self._take_held(request):
            self.waiting.push(sibling)
        samples = self.requests[request.request_id]
        del samples[request.sample_index]
        if not samples:
            del self.requests[request.request_id]

    def _take_held(self, leader: Request) -> list[Request]:
        siblings, leader.held_siblings = leader.held_siblings, []
        self._num_held -= len(siblings)
        for sibling in siblings:
            sibling.status = RequestStatus.WAITING
        return siblings

    # ------------------------------------------------------------------ one step: what to compute

    def schedule(self) -> ScheduledBatch:
        """Decodes first, then prompts under way, then admissions, until the token budget is spent.

        The batch counts as computed from here on, so the next one may be scheduled before `update` has taken in this
        one; a batch that will not run must be given to `retract`.
        """
        copies: list[BlockCopy] = []
        preempted = self._secure_decodes()
        budget = StepBudget(self.max_num_batched_tokens)
        for request in self.running:
            if request.num_pending_tokens == 1 and not request.is_complete and budget.take(request):
                copies += self._grow(request, request.num_tokens)
        prompts = [request for request in self.running if request.num_pending_tokens > 1]
        for request in sorted(prompts, key=lambda request: request.order):
            budget.take(request)  # its blocks were taken at admission
        # Admitting in a step that had to evict would only move the shortage.
        admits = not preempted or not self.running
        self._admission_stop = self._admit_waiting(budget) if admits else AdmissionStop.CAPACITY
        budget.spread()
        shares = budget.shares()
        finished, self._finished_seq_ids = self._finished_seq_ids, []
        return ScheduledBatch(
            rows=[self._take_row(request, count) for request, count in shares],
            num_decode_rows=sum(count == 1 for _, count in shares),
            block_copies=copies,
            finished_seq_ids=finished,
        )

    def _take_row(self, request: Request, count: int) -> ScheduledRow:
        """The row of a step, which the request counts as computed."""
        row = ScheduledRow(
            request.seq_id,
            request.token_ids,
            request.num_prompt_tokens,
            request.num_computed_tokens,
            count,
            self.blocks.block_ids(request.seq_id),
            request.params,
            request.seed,
            self._eos_token_ids,
            request.num_drawing_tokens,
        )
        request.num_computed_tokens += count
        request.num_drawing_tokens += row.draws_token
        return row

    def retract(self, batch: ScheduledBatch) -> None:
        """Take back the latest batch, which will not run. The blocks that its rows were given stay with them."""
        for row in batch.rows:
            request = self._find(row.seq_id)
            if request is not None:
                request.num_computed_tokens = row.num_computed_tokens
                request.num_drawing_tokens -= row.draws_token

    def holds(self, row: ScheduledRow) -> bool:
        """Whether a scheduled row still has its blocks: its sequence runs, and has not been preempted since."""
        request = self._find(row.seq_id)
        running = request is not None and request.status is RequestStatus.RUNNING
        return running and self.blocks.block_ids(row.seq_id)[0] is row.block_ids[0]

    def drop_row(self, row: ScheduledRow) -> None:
        """Take back a row that failed and has lost its blocks meanwhile; its sequence computes it anew."""
        if (request := self._find(row.seq_id)) is not None:
            request.num_drawing_tokens -= row.draws_token

    def _secure_decodes(self) -> bool:
        """Preempt until every running sequence that decodes can write its token. Whether anyone was preempted.

        Done before anything is scheduled, so nothing has to be undone. Prompts need no care: their blocks were all
        taken at admission.
        """
        preempted = False
        while True:
            needed = sum(
                self.blocks.blocks_to_grow(request.seq_id, request.num_computed_tokens, request.num_tokens)
                for request in self.running
                if not request.is_complete
            )
            if needed <= self.blocks.num_free_blocks:
                return preempted
            self._preempt(min(self.running, key=self._cost_of_preempting))
            preempted = True

    def _cost_of_preempting(self, request: Request) -> tuple[int, int, tuple[int, int, int]]:
        """Least important first, then whoever loses the least computed work, then the newest."""
        lost = self.blocks.num_exclusive_tokens(request.seq_id, request.num_computed_tokens)
        priority, arrival, sample = request.order
        return (-priority, lost, (0, -arrival, -sample))

    def _preempt(self, request: Request) -> None:
        """Give up its blocks; it waits and recomputes (what the prefix cache still holds it finds again)."""
        self.running.remove(request)
        self.blocks.free(request.seq_id)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.status = RequestStatus.WAITING
        self.waiting.push(request)
        self.counters.num_preemptions += 1

    def _grow(self, request: Request, num_tokens: int) -> list[BlockCopy]:
        copies = self.blocks.grow(request.seq_id, request.num_computed_tokens, num_tokens)
        return [BlockCopy(copy.source, copy.target) for copy in copies]

    def _admit_waiting(self, budget: StepBudget) -> AdmissionStop:
        """Let the first in the queue run while there is a seat, blocks for all its known tokens, and budget.

        A reserve of one block per running sequence stays untouched, so that an admission is not followed at once by
        a preemption. Nobody overtakes the first: a large request cannot starve.
        """
        while (request := self.waiting.peek()) is not None:
            num_spare_blocks = self.blocks.num_free_blocks - len(self.running)
            # Any admission takes a block: spares the look-up of a long prefix in every step.
            if len(self.running) >= self.max_num_running or num_spare_blocks <= 0:
                return AdmissionStop.CAPACITY
            # One that was preempted while its token is being drawn knows in the next step what to compute.
            if budget.left <= 0 or request.num_drawing_tokens:
                return AdmissionStop.BUDGET
            match = self.blocks.match(request.block_hashes, request.token_ids)
            if self.blocks.blocks_to_admit(match, request.num_tokens) > num_spare_blocks:
                return AdmissionStop.CAPACITY
            self._admit(request, match)
            budget.take(request)
        return AdmissionStop.QUEUE_EMPTY

    def _admit(self, request: Request, match: PrefixMatch) -> None:
        self.waiting.remove(request)
        self._note_admission(request, match)
        self.blocks.begin(request.seq_id, match)
        request.num_computed_tokens = match.num_tokens
        self._grow(request, request.num_tokens)
        request.status = RequestStatus.RUNNING
        self.running.append(request)

    def _note_admission(self, request: Request, match: PrefixMatch) -> None:
        if request.scheduled_time is None:
            request.scheduled_time = self._clock()
        if request.num_preemptions > 0 or request.sample_index > 0:
            return  # a readmission finds its own blocks again, a sibling its leader's: counting that would flatter
        request.num_cached_tokens = match.num_tokens
        if self.blocks.enable_prefix_caching:
            misses = self.blocks.explain_misses(request.block_hashes, request.num_tokens, match)
            self.counters.prefix_cache_queries += request.num_tokens
            self.counters.prefix_cache_hits += match.num_tokens
            self.counters.prefix_misses_new += misses.num_new_tokens
            self.counters.prefix_misses_evicted += misses.num_evicted_tokens
            self.counters.prefix_misses_tail += misses.num_tail_tokens

    # ------------------------------------------------------------------ one step: what came of it

    def update(self, batch: ScheduledBatch, sampled: Sequence[SampledRow]) -> list[Progress]:
        """Take in a computed batch: publish, fork, append drawn tokens, stop. Batches come in the order of `schedule`.

        Rows whose sequence has ended since are passed over; one that has been preempted since keeps its token.
        """
        drawn = {row.seq_id: row for row in sampled}
        now = self._clock()
        progress = []
        for row in batch.rows:
            request = self._find(row.seq_id)
            if request is None:
                continue
            self._note_computed(request, row)
            result = drawn.get(row.seq_id)
            if result is not None:
                request.num_drawing_tokens -= 1
                progress.append(self._append(request, result, now))
        return progress

    def _find(self, seq_id: str) -> Request | None:
        request_id, _, sample_index = seq_id.rpartition("/")
        return self.requests.get(request_id, {}).get(int(sample_index))

    def _note_computed(self, request: Request, row: ScheduledRow) -> None:
        before, after = row.num_computed_tokens, row.num_tokens_after
        self.counters.num_recomputed_tokens += max(0, min(after, request.high_water_tokens) - before)
        self.counters.num_prompt_tokens += max(0, min(after, request.num_prompt_tokens) - before)
        request.high_water_tokens = max(request.high_water_tokens, after)
        if self.holds(row):  # else preempted since: the blocks that the row wrote are gone
            self.blocks.publish(request.seq_id, request.block_hashes, request.token_ids, after)
            if request.held_siblings and after >= request.num_prompt_tokens:
                self._fork_siblings(request)

    def _fork_siblings(self, leader: Request) -> None:
        """Start the other samples from the leader's prompt blocks.

        Each recomputes only the last prompt token, to draw its first token from those logits; writing that token's
        K/V is what makes a partial last block split (copy-on-write). Without a seat a sample queues like any other.
        """
        shared = leader.num_prompt_tokens - 1
        for sibling in self._take_held(leader):
            sibling.block_hashes.take_over(leader.block_hashes, shared)
            sibling.num_cached_tokens = leader.num_cached_tokens
            if len(self.running) >= self.max_num_running:
                self._admission_stop = AdmissionStop.CAPACITY
                self.waiting.push(sibling)
                continue
            self.blocks.fork(leader.seq_id, sibling.seq_id, shared)
            sibling.num_computed_tokens = shared
            sibling.scheduled_time = leader.scheduled_time
            sibling.status = RequestStatus.RUNNING
            self.running.append(sibling)

    def _append(self, request: Request, result: SampledRow, now: float) -> Progress:
        """Append drawn tokens up to the first that stops the request."""
        if request.first_token_time is None:
            request.first_token_time = now
        request.last_token_time = now
        stop: Stop | None = None
        num_new = 0
        for token_id in result.token_ids:
            request.token_ids.append(token_id)
            num_new += 1
            stop = check_stop(request, self._eos_token_ids)
            if stop is not None:
                break
        self.counters.num_generation_tokens += num_new
        if stop is not None:
            self._end(request)
        logprobs = None if result.logprobs is None else result.logprobs[:num_new]
        return Progress(request, result.token_ids[:num_new], logprobs, stop)

    def fail(self, seq_id: str) -> list[Request]:
        """End the whole request whose sequence made a step fail; returns its samples that were still live.

        What it computed may be at fault (a NaN in a shared prefix, say), so nobody shall find its blocks again.
        """
        request_id = seq_id.rpartition("/")[0]
        for sample in self.requests.get(request_id, {}).values():
            if sample.status is RequestStatus.RUNNING:
                self.blocks.unpublish(sample.seq_id)
        return self.abort(request_id)
