"""The engine step: schedule, execute, update, emit. The one place that knows both scheduler and runner."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable

from ...scheduler.batch import ScheduledBatch, StepResult
from ...scheduler.progress import Progress, SchedulerCounters
from ...scheduler.request import Request
from ...scheduler.scheduler import QueueFull, Scheduler
from .execution import Execution, Launched, StepRunner, one_line
from .messages import GenerateRequest, RequestError, RequestTimings, StepOutput, StepStats, TokenOutput

logger = logging.getLogger("octavo.engine")


class EngineCore:
    """Requests in, tokens out, one step at a time. Not thread-safe; knows nothing of processes and sockets."""

    def __init__(self, scheduler: Scheduler, runner: StepRunner, *, probe: Callable[[], None] = lambda: None) -> None:
        """`probe` runs a harmless step and raises if even that fails."""
        self.scheduler = scheduler
        self._execution = Execution(runner, probe)
        self._ahead: Launched | None = None
        """A step that runs while the one before it is being looked at."""
        self._outputs: list[TokenOutput] = []
        self._reported = SchedulerCounters()
        self._num_evicted_reported = 0
        self._emit_seconds = 0.0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._ahead is not None or bool(self._outputs)

    def add(self, message: GenerateRequest) -> None:
        """Queue a request; a refusal becomes its one output."""
        try:
            self.scheduler.add(
                message.request_id,
                message.prompt_token_ids,
                message.params,
                priority=message.priority,
                cache_salt=message.cache_salt,
                arrival_time=message.arrival_time or None,
            )
        except QueueFull as error:
            self._refuse(message.request_id, RequestError(code="queue_full", message=str(error)))
        except ValueError as error:
            self._refuse(message.request_id, RequestError(code="invalid_request", message=str(error), param="prompt"))

    def abort(self, request_id: str, sample_index: int | None = None) -> None:
        self.scheduler.abort(request_id, sample_index)

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> StepOutput:
        """Take in one step, while a runner that can runs the next. `meanwhile` is called once, when a step has been
        launched. Raises what it raises, or EngineFailure when nothing can be computed any more."""
        running = self._ahead
        if running is not None:
            self._spend(meanwhile, running)
        started = time.perf_counter()
        launches = [] if running else [self._launch()]
        current = running or launches[0]
        self._ahead = None
        if self._execution.runner.runs_ahead and current.batch.rows:
            launches.append(self._launch())
            self._ahead = launches[-1] if launches[-1].batch.rows else None
        schedule_seconds = time.perf_counter() - started - sum(launched.seconds for launched in launches)
        if running is None:
            self._spend(meanwhile, current, self._ahead)
        result = self._result(current)
        executed = time.perf_counter()
        outputs, self._outputs = self._outputs, []
        outputs += map(_token_output, self.scheduler.update(current.batch, result.sampled))
        return StepOutput(
            outputs=outputs,
            stats=self.stats(
                num_scheduled_tokens=current.batch.num_tokens,
                schedule_seconds=schedule_seconds,
                forward_seconds=result.forward_seconds,
                sample_seconds=result.sample_seconds,
                update_seconds=time.perf_counter() - executed,
            ),
        )

    def _spend(self, meanwhile: Callable[[], None], *launched: Launched | None) -> None:
        """Do something else while steps run. If that fails, they are waited for: threads may be at work on them."""
        try:
            meanwhile()
        except BaseException:
            for step in filter(None, launched):
                self._execution.abandon(step)
            self._ahead = None
            raise

    def _launch(self) -> Launched:
        """Schedule a step and start it."""
        batch = self.scheduler.schedule()
        self._execution.runner.release(batch.finished_seq_ids)
        launched = self._execution.launch(batch)
        for seq_id, error in launched.failed.items():
            self._blame(seq_id, error)
        return launched

    def _result(self, current: Launched) -> StepResult:
        """What a step came to; if it failed, its healthy rows' part, the others' requests being ended."""
        try:
            return current.pending.result()
        except Exception as error:
            if self._ahead is not None:
                # It builds on tokens that may never be: it is scheduled again.
                self._execution.abandon(self._ahead)
                self.scheduler.retract(self._ahead.batch)
                self._ahead = None
            result, failed = self._execution.isolate(self._what_can_run_again(current.part), error)
            for seq_id, cause in failed.items():
                self._blame(seq_id, cause)
            return result

    def _what_can_run_again(self, failed: ScheduledBatch) -> ScheduledBatch:
        """The rows of a failed step that still have their blocks. The step ahead may have preempted others to make
        room, and has written what is not theirs into blocks that were."""
        rows = []
        for row in failed.rows:
            if self.scheduler.holds(row):
                rows.append(row)
            else:
                self.scheduler.drop_row(row)
        return ScheduledBatch(rows, sum(row.num_scheduled_tokens == 1 for row in rows)).known()

    def note_emitted(self, seconds: float) -> None:
        """How long it took to encode a step's output and hand it over; reported with the next message."""
        self._emit_seconds += seconds

    def idle(self) -> StepOutput:
        """A sign of life between requests; also lets go of what the runner keeps for the last of them."""
        self._execution.runner.release(self.scheduler.schedule().finished_seq_ids)
        return StepOutput(outputs=[], stats=self.stats())

    def stats(
        self,
        *,
        num_scheduled_tokens: int = 0,
        schedule_seconds: float = 0.0,
        forward_seconds: float = 0.0,
        sample_seconds: float = 0.0,
        update_seconds: float = 0.0,
    ) -> StepStats:
        """Gauges as they are, counters since the last call."""
        now, before = copy.copy(self.scheduler.counters), self._reported
        self._reported = now
        blocks = self.scheduler.blocks.counts()
        num_evicted, self._num_evicted_reported = blocks.num_evicted - self._num_evicted_reported, blocks.num_evicted
        emit_seconds, self._emit_seconds = self._emit_seconds, 0.0
        return StepStats(
            num_running=len(self.scheduler.running),
            num_waiting=self.scheduler.num_waiting,
            num_waiting_deferred=self.scheduler.waiting_counts.num_deferred,
            num_blocks=blocks.num_usable,
            num_free_blocks=blocks.num_free,
            num_cached_blocks=blocks.num_cached_free,
            num_shared_blocks=blocks.num_shared,
            block_usage=blocks.usage,
            prefix_cache_queries=now.prefix_cache_queries - before.prefix_cache_queries,
            prefix_cache_hits=now.prefix_cache_hits - before.prefix_cache_hits,
            prefix_misses_new=now.prefix_misses_new - before.prefix_misses_new,
            prefix_misses_evicted=now.prefix_misses_evicted - before.prefix_misses_evicted,
            prefix_misses_tail=now.prefix_misses_tail - before.prefix_misses_tail,
            num_evicted_blocks=num_evicted,
            num_preemptions=now.num_preemptions - before.num_preemptions,
            num_recomputed_tokens=now.num_recomputed_tokens - before.num_recomputed_tokens,
            num_prompt_tokens=now.num_prompt_tokens - before.num_prompt_tokens,
            num_generation_tokens=now.num_generation_tokens - before.num_generation_tokens,
            num_scheduled_tokens=num_scheduled_tokens,
            schedule_seconds=schedule_seconds,
            forward_seconds=forward_seconds,
            sample_seconds=sample_seconds,
            update_seconds=update_seconds,
            emit_seconds=emit_seconds,
        )

    def _blame(self, seq_id: str, error: Exception) -> None:
        logger.error("request %s ended: %s", seq_id.rpartition("/")[0], one_line(error), exc_info=error)
        ended = self.scheduler.fail(seq_id)
        if ended:  # its other samples may have failed in the same step
            message = f"the engine failed on this request: {type(error).__name__}"
            self._refuse(ended[0].request_id, RequestError(code="internal_error", message=message))

    def _refuse(self, request_id: str, error: RequestError) -> None:
        self._outputs.append(TokenOutput(request_id=request_id, finish_reason="error", error=error))


def _token_output(progress: Progress) -> TokenOutput:
    """Between the first output of a sample and its last there is nothing to say but the tokens."""
    request, stop = progress.request, progress.stop
    if stop is None and not progress.is_first:
        return TokenOutput(
            request_id=request.request_id,
            sample_index=request.sample_index,
            token_ids=progress.token_ids,
            logprobs=progress.logprobs,
        )
    return TokenOutput(
        request_id=request.request_id,
        sample_index=request.sample_index,
        token_ids=progress.token_ids,
        logprobs=progress.logprobs,
        finish_reason=stop.reason if stop is not None else None,
        stop_token_id=stop.token_id if stop is not None else None,
        num_cached_tokens=request.num_cached_tokens,
        timings=_timings(request),
    )


def _timings(request: Request) -> RequestTimings:
    arrival = request.arrival_time
    return RequestTimings(
        arrival=arrival,
        scheduled=request.scheduled_time or arrival,
        first_token=request.first_token_time or arrival,
        last_token=request.last_token_time or arrival,
        num_preemptions=request.num_preemptions,
    )
