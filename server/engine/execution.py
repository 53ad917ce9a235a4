"""Running scheduled batches: launch, wait, and find out whose fault it is when a step fails."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

from ...scheduler.batch import BlockCopy, PendingStep, ScheduledBatch, StepResult

logger = logging.getLogger("octavo.engine")


class StepRunner(Protocol):
    """What the engine needs of the model room (model/runner.py), or of a fake one in tests."""

    @property
    def runs_ahead(self) -> bool:
        """Whether `launch` takes rows whose newest token the step before draws, while that runs."""
        ...

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None: ...

    def launch(self, batch: ScheduledBatch) -> PendingStep: ...

    def release(self, seq_ids: Sequence[str]) -> None: ...


class EngineFailure(Exception):
    """The engine cannot compute any more; its process should end and be started anew."""


@dataclass(slots=True)
class Launched:
    """A batch on its way."""

    batch: ScheduledBatch
    """As scheduled."""
    part: ScheduledBatch
    """Its rows that really run: those whose copies could be made."""
    pending: PendingStep
    seconds: float
    """What launching took; the result's times have it too."""
    failed: dict[str, Exception] = field(default_factory=dict)
    """Sequences that have failed already."""


@dataclass(slots=True)
class _FailedStep:
    error: Exception

    def result(self) -> NoReturn:
        raise self.error


class Execution:
    """The runner, with failures taken apart: one bad row ends its own request and nothing else."""

    def __init__(self, runner: StepRunner, probe: Callable[[], None]) -> None:
        self.runner = runner
        self._probe = probe

    def launch(self, batch: ScheduledBatch) -> Launched:
        """Start a batch. Never raises: an error waits where the result would be."""
        part, failed = self._copy_blocks(batch)
        started = time.perf_counter()
        pending: PendingStep
        try:
            pending = self.runner.launch(part) if part.rows else StepResult([])
        except Exception as error:
            pending = _FailedStep(error)
        return Launched(batch, part, pending, time.perf_counter() - started, failed)

    def abandon(self, launched: Launched) -> None:
        """Wait for a step whose result nobody wants any more."""
        with contextlib.suppress(Exception):
            launched.pending.result()

    def _copy_blocks(self, batch: ScheduledBatch) -> tuple[ScheduledBatch, dict[str, Exception]]:
        """Carry out the batch's copies: the batch without the rows whose copy fails even alone, and these."""
        try:
            self.runner.copy_blocks(batch.block_copies)
            return batch, {}
        except Exception as error:
            logger.warning("copying %d blocks failed (%s)", len(batch.block_copies), one_line(error))
        lost: list[tuple[BlockCopy, Exception]] = []
        for copy in batch.block_copies:
            try:
                self.runner.copy_blocks([copy])
            except Exception as error:
                lost.append((copy, error))
        rows = []
        failed: dict[str, Exception] = {}
        for row in batch.rows:
            errors = [error for copy, error in lost if copy.target in row.block_ids[copy.group]]
            if errors:
                failed[row.seq_id] = errors[0]
            else:
                rows.append(row)
        num_decode_rows = sum(row.num_scheduled_tokens == 1 for row in rows)
        return ScheduledBatch(rows, num_decode_rows), failed

    def isolate(self, batch: ScheduledBatch, error: Exception) -> tuple[StepResult, dict[str, Exception]]:
        """A batch has failed with `error`: what its healthy rows come to, and whose rows fail alone.

        By bisection: running a row twice writes the same K/V twice, so trying again harms nobody. Raises EngineFailure
        when nothing can be computed any more.
        """
        logger.warning("a step of %d rows failed (%s); looking for the cause", len(batch.rows), one_line(error))
        failed: dict[str, Exception] = {}
        # As a whole first: whoever was to blame may not be among these rows any more, or the step ahead was.
        result = self._run(batch, failed)
        if failed and len(failed) == len(batch.rows):
            self._check_health(error)
        return result, failed

    def _check_health(self, error: Exception) -> None:
        """Every row of a step has failed: are they all to blame, or is it the machine?"""
        try:
            self._probe()
        except Exception as probe_error:
            raise EngineFailure(f"the engine cannot compute any more: {one_line(probe_error)}") from error

    def _run(self, batch: ScheduledBatch, failed: dict[str, Exception]) -> StepResult:
        """Run a batch; if it fails, its halves, each on its own."""
        if not batch.rows:
            return StepResult([])
        try:
            return self.runner.launch(batch).result()
        except Exception as error:
            if len(batch.rows) == 1:
                failed[batch.rows[0].seq_id] = error
                return StepResult([])
        middle = len(batch.rows) // 2
        results = [self._run(part, failed) for part in (batch.part(0, middle), batch.part(middle, len(batch.rows)))]
        return StepResult(
            [row for result in results for row in result.sampled],
            sum(result.forward_seconds for result in results),
            sum(result.sample_seconds for result in results),
        )


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
