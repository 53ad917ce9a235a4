"""An engine core around a runner that computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import http_fakes
import msgspec
from octavo.scheduler.batch import BlockCopy, PendingStep, SampledRow, ScheduledBatch, StepResult
from octavo.scheduler.config import CacheConfig, PoolConfig, SchedulerConfig
from octavo.scheduler.sampling_params import SamplingParams
from octavo.scheduler.scheduler import Scheduler
from octavo.server.engine.core import EngineCore
from octavo.server.engine.messages import GenerateRequest

READY = msgspec.structs.replace(http_fakes.READY, max_model_len=64, vocab_size=100)


class ScriptedRunner:
    """Draws token 7 for every row; raises for batches that hold a poisoned request."""

    runs_ahead = False

    def __init__(self) -> None:
        self.poisoned: set[str] = set()
        self.broken = False
        self.executed: list[int] = []
        self.released: list[str] = []

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None: ...

    def launch(self, batch: ScheduledBatch) -> PendingStep:
        self.executed.append(len(batch.rows))
        if self.broken or any(row.seq_id.rpartition("/")[0] in self.poisoned for row in batch.rows):
            raise RuntimeError("secret prompt text")
        return StepResult([SampledRow(row.seq_id, [7]) for row in batch.rows if row.draws_token])

    def release(self, seq_ids: Sequence[str]) -> None:
        self.released += seq_ids

    def probe(self) -> None:
        if self.broken:
            raise RuntimeError("no device")


class OverlappingRunner(ScriptedRunner):
    """Its steps run until somebody asks for their result; `at_result` is called then."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []
        self.at_result: Callable[[], None] = lambda: None

    def launch(self, batch: ScheduledBatch) -> PendingStep:
        self.events.append("launch")
        return _Pending(self, super().launch(batch))


@dataclass
class _Pending:
    runner: OverlappingRunner
    step: PendingStep

    def result(self) -> StepResult:
        self.runner.events.append("result")
        self.runner.at_result()
        return self.step.result()


def core_of(runner: ScriptedRunner) -> EngineCore:
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=32, max_num_waiting=8),
        CacheConfig(block_size=4),
        pools=[PoolConfig(257)],
        max_model_len=64,
        max_num_batched_tokens=64,
        eos_token_ids=(99,),
    )
    return EngineCore(scheduler, runner, probe=runner.probe)


def request(name: str, **params: int) -> GenerateRequest:
    defaults = {"max_tokens": 3}
    return GenerateRequest(request_id=name, prompt_token_ids=[1, 2, 3], params=SamplingParams(**{**defaults, **params}))
