"""The engine step: schedule, execute, update, emit. The one place that knows both scheduler and runner."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ...scheduler.batch import BlockCopy, ScheduledBatch, StepResult
from ...scheduler.progress import Progress, SchedulerCounters
from ...scheduler.request import Request
from ...scheduler.scheduler import QueueFull, Scheduler
from .messages import GenerateRequest, RequestError, RequestTimings, StepOutput, StepStats, TokenOutput

logger = logging.getLogger("octavo.engine")


class StepRunner(Protocol):
    """What the core needs of the model room (model/runner.py), or of a fake one in tests."""

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None: ...

    def execute(self, batch: ScheduledBatch) -> StepResult: ...

    def release(self, seq_ids: Sequence[str]) -> None: ...


class EngineFailure(Exception):
    """The engine cannot compute any more; its process should end and be started anew."""


class EngineCore:
    """Requests in, tokens out, one step at a time. Not thread-safe; knows nothing of processes and sockets."""

    def __init__(self, scheduler: Scheduler, runner: StepRunner, *, probe: Callable[[], None] = lambda: None) -> None:
        """`probe` runs a harmless step and raises if even that fails."""
        self.scheduler = scheduler
        self._runner = runner
        self._probe = probe
        self._outputs: list[TokenOutput] = []
        self._reported = SchedulerCounters()
        self._num_evicted_reported = 0
        self._emit_seconds = 0.0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._outputs)

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

    def step(self) -> StepOutput:
        """Run one step. Raises EngineFailure when nothing can be computed any more."""
        started = time.perf_counter()
        batch = self.scheduler.schedule()
        self._runner.release(batch.finished_seq_ids)
        scheduled = time.perf_counter()
        result = self._execute(batch)
        executed = time.perf_counter()
        for progress in self.scheduler.update(batch, result.sampled):
            self._outputs.append(_token_output(progress))
        outputs, self._outputs = self._outputs, []
        return StepOutput(
            outputs=outputs,
            stats=self.stats(
                num_scheduled_tokens=batch.num_tokens,
                schedule_seconds=scheduled - started,
                forward_seconds=result.forward_seconds,
                sample_seconds=result.sample_seconds,
                update_seconds=time.perf_counter() - executed,
            ),
        )

    def note_emitted(self, seconds: float) -> None:
        """How long it took to encode a step's output and hand it over; reported with the next message."""
        self._emit_seconds += seconds

    def idle(self) -> StepOutput:
        """A sign of life between requests; also lets go of what the runner keeps for the last of them."""
        self._runner.release(self.scheduler.schedule().finished_seq_ids)
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
        now, before = dataclasses.replace(self.scheduler.counters), self._reported
        self._reported = now
        pool = self.scheduler.blocks.pool
        num_evicted, self._num_evicted_reported = pool.num_evicted - self._num_evicted_reported, pool.num_evicted
        emit_seconds, self._emit_seconds = self._emit_seconds, 0.0
        return StepStats(
            num_running=len(self.scheduler.running),
            num_waiting=self.scheduler.num_waiting,
            num_waiting_deferred=self.scheduler.waiting_counts.num_deferred,
            num_blocks=pool.num_usable,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached_free,
            num_shared_blocks=pool.num_shared,
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

    # ------------------------------------------------------------------ failures

    def _execute(self, batch: ScheduledBatch) -> StepResult:
        """Run a batch; if it fails, find the rows that make it fail and end their requests alone."""
        batch = self._copy_blocks(batch)
        if not batch.rows:
            return StepResult([])
        try:
            return self._runner.execute(batch)
        except Exception as error:
            return self._isolate(batch, error)

    def _copy_blocks(self, batch: ScheduledBatch) -> ScheduledBatch:
        """Carry out the batch's copies; a row whose copy fails even alone ends with its request."""
        try:
            self._runner.copy_blocks(batch.block_copies)
            return batch
        except Exception as error:
            logger.warning("copying %d blocks failed (%s)", len(batch.block_copies), _one_line(error))
        failed: dict[int, Exception] = {}
        for copy in batch.block_copies:
            try:
                self._runner.copy_blocks([copy])
            except Exception as error:
                failed[copy.target] = error
        rows = []
        for row in batch.rows:
            targets = [block_id for table in row.block_ids for block_id in table if block_id in failed]
            if targets:
                self._blame(row.seq_id, failed[targets[0]])
            else:
                rows.append(row)
        num_decode_rows = sum(row.num_scheduled_tokens == 1 for row in rows)
        return ScheduledBatch(rows, num_decode_rows)

    def _isolate(self, batch: ScheduledBatch, error: Exception) -> StepResult:
        """Bisection: running a row twice writes the same K/V twice, so trying again harms nobody."""
        logger.warning("a step of %d rows failed (%s); looking for the cause", len(batch.rows), _one_line(error))
        failed: dict[str, Exception] = {}
        result = self._run_or_split(batch, error, failed)
        if len(failed) == len(batch.rows):
            self._check_health(error)
        for seq_id, cause in failed.items():
            self._blame(seq_id, cause)
        return result

    def _check_health(self, error: Exception) -> None:
        """Every row of a step has failed: are they all to blame, or is it the machine?"""
        try:
            self._probe()
        except Exception as probe_error:
            raise EngineFailure(f"the engine cannot compute any more: {_one_line(probe_error)}") from error

    def _run_or_split(self, batch: ScheduledBatch, error: Exception, failed: dict[str, Exception]) -> StepResult:
        """`batch` has just failed with `error`: run its halves, each on its own."""
        if len(batch.rows) == 1:
            failed[batch.rows[0].seq_id] = error
            return StepResult([])
        middle = len(batch.rows) // 2
        results = []
        for part in (batch.part(0, middle), batch.part(middle, len(batch.rows))):
            try:
                results.append(self._runner.execute(part))
            except Exception as part_error:
                results.append(self._run_or_split(part, part_error, failed))
        return StepResult(
            [row for result in results for row in result.sampled],
            sum(result.forward_seconds for result in results),
            sum(result.sample_seconds for result in results),
        )

    def _blame(self, seq_id: str, error: Exception) -> None:
        logger.error("request %s ended: %s", seq_id.rpartition("/")[0], _one_line(error), exc_info=error)
        ended = self.scheduler.fail(seq_id)
        if ended:  # its other samples may have failed in the same step
            message = f"the engine failed on this request: {type(error).__name__}"
            self._refuse(ended[0].request_id, RequestError(code="internal_error", message=message))

    def _refuse(self, request_id: str, error: RequestError) -> None:
        self._outputs.append(TokenOutput(request_id=request_id, finish_reason="error", error=error))


def _token_output(progress: Progress) -> TokenOutput:
    request, stop = progress.request, progress.stop
    return TokenOutput(
        request_id=request.request_id,
        sample_index=request.sample_index,
        token_ids=progress.token_ids,
        logprobs=progress.logprobs,
        finish_reason=stop.reason if stop is not None else None,
        stop_token_id=stop.token_id if stop is not None else None,
        num_cached_tokens=request.num_cached_tokens,
        timings=_timings(request) if stop is not None or request.num_output_tokens == len(progress.token_ids) else None,
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


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
