"""Decode steps on a backend that runs and draws them in one call: no tensors are made, and little else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ..kernels.backend import DecodeRows, DrawParameters, RecordedSteps
from ..scheduler.batch import PendingStep, ScheduledBatch, StepResult
from .block_tables import BlockTables
from .drawn import sampled_rows
from .sampler import Sampler


class DirectDecode:
    """Runs batches of nothing but decodes whose rows ask for nothing but to be drawn."""

    def __init__(
        self, steps: RecordedSteps, sampler: Sampler, block_tables: Sequence[BlockTables], block_size: int
    ) -> None:
        """`block_tables`: of each group of layers, shared with whoever runs the other batches."""
        self._steps = steps
        self._sampler = sampler
        self._block_tables = block_tables
        self._block_size = block_size
        self._parameters: DrawParameters | None = None
        self._may_edit = False
        """Whether rows of these parameters may ever ask for more than to be drawn."""

    def launch(self, batch: ScheduledBatch) -> PendingStep | None:
        """Start the batch. None, and nothing is done, for another kind of it."""
        started = time.perf_counter()
        if not batch.only_decodes:
            return None
        rows = batch.rows
        parameters = self._sampler.parameters(rows)
        if parameters is not self._parameters:
            self._parameters = parameters
            self._may_edit = any(row.params.may_edit_logits for row in rows)
        if self._may_edit and any(self._sampler.asks_for_more(row) for row in rows):
            return None
        size = self._block_size
        positions = [row.num_computed_tokens for row in rows]
        groups = range(len(self._block_tables))
        decodes = DecodeRows(
            token_ids=[row.token_ids[row.num_computed_tokens] for row in rows],
            positions=positions,
            slots=[
                [
                    row.block_ids[group][position // size] * size + position % size
                    for row, position in zip(rows, positions, strict=True)
                ]
                for group in groups
            ],
            table_rows=[tables.update(rows) for tables in self._block_tables],
            block_tables=[tables.array for tables in self._block_tables],
        )
        running = _RunningDecodes(self._steps, [row.seq_id for row in rows])
        self._steps.start_decode(decodes, parameters)
        running.launch_seconds = time.perf_counter() - started
        return running


@dataclass(slots=True)
class _RunningDecodes:
    """A `PendingStep`: other threads are at work, and whoever asks for the result works along."""

    _steps: RecordedSteps
    _seq_ids: list[str]
    launch_seconds: float = 0.0

    def result(self) -> StepResult:
        started = time.perf_counter()
        sampled = sampled_rows(self._seq_ids, self._steps.finish_decode())
        return StepResult(sampled, self.launch_seconds + time.perf_counter() - started)
