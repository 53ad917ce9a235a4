"""Continuous batching: each step, which sequences compute how many of their tokens.

There is no prefill mode and no decode mode. `num_computed_tokens` of each request chases `num_tokens` under one
token budget (the idea is vLLM's); chunked prefill, prefix hits, parallel samples and preemption by recompute all
fall out of that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ..block_manager.manager import BlockManager, PrefixMatch
from .batch import SampledRow, ScheduledBatch, ScheduledRow
from .budget import StepBudget
from .config import CacheConfig, PoolConfig, SchedulerConfig
from .held_blocks import HeldBlocks
from .progress import AdmissionStop, Progress, SchedulerCounters, WaitingCounts
from .queue import WaitingQueue
from .request import Request, RequestStatus, live_owner, make_samples
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
        pools: Sequence[PoolConfig],
        max_model_len: int,
        max_num_batched_tokens: int,
        eos_token_ids: Sequence[int] = (),
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """One pool for each layer group; a sequence of `max_model_len` must fit into them (ValueError)."""
        self.blocks = BlockManager(
            pools, cache.block_size, max_num_batched_tokens, enable_prefix_caching=cache.enable_prefix_caching
        )
        if not self.blocks.can_hold(max_model_len):
            raise ValueError(f"a sequence of {max_model_len} tokens does not fit into {pools}")
        self._block_size = cache.block_size
        self._held = HeldBlocks(self.blocks)
        self.max_model_len = max_model_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_running = min(config.max_num_seqs, max_num_batched_tokens)  # decodes never exceed the budget
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
        self._num_in_flight = 0
        """Batches that were scheduled and not taken in yet."""
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
        samples = make_samples(
            request_id,
            prompt_token_ids,
            params,
            seed=self._seed + self._num_arrived if params.seed is None else params.seed,
            order=(priority, self._num_arrived),
            max_total_tokens=min(self.max_model_len, len(prompt_token_ids) + max_tokens),
            eos_token_ids=self._eos_token_ids,
            block_size=self.blocks.block_size,
            cache_salt=cache_salt,
            arrival_time=self._clock() if arrival_time is None else arrival_time,
        )
        self.requests[request_id] = {sample.sample_index: sample for sample in samples}
        self._num_held += len(samples) - 1
        self.waiting.push(samples[0])

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
            self._held.free(request)
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
        num_preemptions = self.counters.num_preemptions
        self._make_room()
        rows: list[ScheduledRow] = []
        prompts: list[Request] = []
        for request in self.running:
            num_tokens = len(request.token_ids) + request.num_drawing_tokens
            if num_tokens - request.num_computed_tokens > 1:
                prompts.append(request)
            elif num_tokens > request.num_writable_tokens:
                continue  # its window waits for the step in flight
            elif num_tokens < request.max_total_tokens or not request.is_complete:
                rows.append(self._take_row(request, 1))  # no more sequences run than a step has tokens
        budget = StepBudget(self.max_num_batched_tokens - len(rows), self._held.reserve)
        self._serve(sorted(prompts, key=lambda request: request.order), budget, alone=not rows)
        preempted = self.counters.num_preemptions > num_preemptions
        # Admitting in a step that had to evict would only move the shortage.
        admits = not preempted or not self.running
        self._admission_stop = self._admit_waiting(budget) if admits else AdmissionStop.CAPACITY
        budget.spread()
        shares = budget.shares()
        num_decode_rows = len(rows) + sum(count == 1 for _, count in shares)
        rows += [self._take_row(request, count) for request, count in shares]
        self._num_in_flight += bool(rows)
        finished, self._finished_seq_ids = self._finished_seq_ids, []
        return ScheduledBatch(rows, num_decode_rows, self._held.take_copies(), finished)

    def _take_row(self, request: Request, count: int) -> ScheduledRow:
        """The row of a step, which the request counts as computed."""
        before, num_drawing = request.num_computed_tokens, request.num_drawing_tokens
        token_ids = request.token_ids
        request.num_computed_tokens = after = before + count
        if after == len(token_ids) + num_drawing:
            request.num_drawing_tokens = num_drawing + 1
        return ScheduledRow(
            request.seq_id,
            token_ids,
            request.num_prompt_tokens,
            before,
            count,
            request.block_ids,
            request.params,
            request.seed,
            self._eos_token_ids,
            num_drawing,
            request,
        )

    def retract(self, batch: ScheduledBatch) -> None:
        """Take back the latest batch, which will not run. The blocks that its rows were given stay with them."""
        self._num_in_flight -= bool(batch.rows)
        for row in batch.rows:
            request = live_owner(row)
            if request is not None:
                request.num_computed_tokens = row.num_computed_tokens
                request.num_drawing_tokens -= row.draws_token

    def holds(self, row: ScheduledRow) -> bool:
        """Whether a scheduled row still has its blocks: its sequence runs, and has not been preempted since."""
        request = live_owner(row)
        return request is not None and request.block_ids is row.block_ids

    def drop_row(self, row: ScheduledRow) -> None:
        """Take back a row that failed and has lost its blocks meanwhile; its sequence computes it anew.

        From the start: whose fault it was cannot be found out any more, so nothing of it is taken from the cache.
        """
        request = live_owner(row)
        if request is not None:
            request.num_drawing_tokens = 0  # the step ahead was retracted: nothing else of it is in flight
            self._held.withdraw(request)

    def _make_room(self) -> None:
        """Give every sequence that decodes the blocks that its next token needs, preempting others until there are
        enough. Where only windows are short, a step in flight is waited for: its end gives back what they have passed.
        Done before anything is scheduled, so nothing has to be undone."""
        while True:
            growing = self._held.growing(self.running)
            if not growing or self._held.can_grow(growing, but_windows=self._num_in_flight > 0):
                break
            self._preempt(min(self.running, key=self._held.cost_of_preempting))
        for request in growing:
            self._held.grow(request)

    def _serve(self, prompts: list[Request], budget: StepBudget, *, alone: bool) -> None:
        """Tokens for prompts under way. If nothing runs beside them and their windows fill a pool so that none can go
        on, preempt some; but not while a step runs, whose end gives back what its rows' windows have passed."""
        while True:
            for request in prompts:
                budget.take(request)
            if not alone or not prompts or self._num_in_flight or budget.shares():
                return
            victim = min(prompts, key=self._held.cost_of_preempting)
            prompts.remove(victim)
            self._preempt(victim)

    def _preempt(self, request: Request) -> None:
        """Give up its blocks; it waits and recomputes (what the prefix cache still holds it finds again)."""
        self.running.remove(request)
        self._held.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.status = RequestStatus.WAITING
        self.waiting.push(request)
        self.counters.num_preemptions += 1

    def _admit_waiting(self, budget: StepBudget) -> AdmissionStop:
        """Let the first in the queue run while there is a seat, blocks for all its known tokens, and budget.

        A reserve of one block per running sequence stays untouched, so that an admission is not followed at once by
        a preemption. Nobody overtakes the first: a large request cannot starve.
        """
        while (request := self.waiting.peek()) is not None:
            spare = self._held.spare(self.running)
            # Any admission takes a block of each group: spares the look-up of a long prefix in every step.
            if len(self.running) >= self.max_num_running or min(spare) <= 0:
                return AdmissionStop.CAPACITY
            # One that was preempted while its token is being drawn knows in the next step what to compute.
            if budget.left <= 0 or request.num_drawing_tokens:
                return AdmissionStop.BUDGET
            match = self.blocks.match(request.block_hashes, request.token_ids)
            if not self._held.fits(request, match, spare):
                return AdmissionStop.CAPACITY
            self._admit(request, match)
            budget.take(request)
        return AdmissionStop.QUEUE_EMPTY

    def _admit(self, request: Request, match: PrefixMatch) -> None:
        self.waiting.remove(request)
        self._note_admission(request, match)
        self._held.begin(request, match)
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
            self.counters.count_prefix(request.num_tokens, match.num_tokens, misses)

    # ------------------------------------------------------------------ one step: what came of it

    def update(self, batch: ScheduledBatch, sampled: Sequence[SampledRow]) -> list[Progress]:
        """Take in a computed batch: publish, fork, append drawn tokens, stop. Batches come in the order of `schedule`.

        Rows whose sequence has ended since are passed over; one that has been preempted since keeps its token.
        """
        self._num_in_flight -= bool(batch.rows)
        drawn = {row.seq_id: row for row in sampled}
        now = self._clock()
        progress = []
        for row in batch.rows:
            request = live_owner(row)
            if request is None:
                continue
            self._note_computed(request, row)
            result = drawn.get(row.seq_id)
            if result is not None:
                progress.append(self._append(request, result, now))
        return progress

    def _note_computed(self, request: Request, row: ScheduledRow) -> None:
        before, after = row.num_computed_tokens, row.num_tokens_after
        self.counters.count_computed(request, before, after)
        if request.block_ids is not row.block_ids:
            return  # preempted since: the blocks that the row wrote are gone
        if after % self._block_size < row.num_scheduled_tokens:  # it has filled a block
            self._held.publish(request, after)
        if request.held_siblings and after >= request.num_prompt_tokens:
            self._fork_siblings(request)
        if after >= request.passes_next_at:  # siblings see one token more than the leader's next, so they come first
            self._held.pass_window(request, after)

    def _fork_siblings(self, leader: Request) -> None:
        """Start the other samples from the leader's prompt blocks.

        Each recomputes only the last prompt token, to draw its first token from those logits; writing that token's
        K/V is what makes a partial last block split (copy-on-write). Without a seat a sample queues like any other, and
        so it does where the leader's window has passed: it was preempted, and found more than the prompt in the cache.
        """
        shared = leader.num_prompt_tokens - 1
        for sibling in self._take_held(leader):
            sibling.block_hashes.take_over(leader.block_hashes, shared)
            sibling.num_cached_tokens = leader.num_cached_tokens
            if no_seat := len(self.running) >= self.max_num_running:
                self._admission_stop = AdmissionStop.CAPACITY
            if no_seat or not self._held.fork(leader, sibling, shared):
                self.waiting.push(sibling)
                continue
            sibling.scheduled_time = leader.scheduled_time
            sibling.status = RequestStatus.RUNNING
            self.running.append(sibling)

    def _append(self, request: Request, result: SampledRow, now: float) -> Progress:
        """Append drawn tokens up to the first that stops the request."""
        is_first = request.first_token_time is None
        if is_first:
            request.first_token_time = now
        request.last_token_time = now
        request.num_drawing_tokens -= 1
        known, drawn, logprobs = request.token_ids, result.token_ids, result.logprobs
        num_known = len(known)
        stop: Stop | None = None
        for token_id in drawn:
            known.append(token_id)
            stop = check_stop(request)
            if stop is not None:
                drawn = known[num_known:]
                logprobs = None if logprobs is None else logprobs[: len(drawn)]
                self._end(request)
                break
        self.counters.num_generation_tokens += len(drawn)
        return Progress(request, drawn, logprobs, stop, is_first)

    def fail(self, seq_id: str) -> list[Request]:
        """End the whole request whose sequence made a step fail; returns its samples that were still live.

        What it computed may be at fault (a NaN in a shared prefix, say), so nobody shall find its blocks again.
        """
        request_id = seq_id.rpartition("/")[0]
        for sample in self.requests.get(request_id, {}).values():
            self._held.withdraw(sample)
        return self.abort(request_id)
