"""The engine in this process, for the tests of this folder that need more of it than a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from octavo.model.config import ModelConfig
from octavo.model.runner import ModelRunner
from octavo.scheduler.config import CacheConfig, PoolConfig, SchedulerConfig
from octavo.scheduler.scheduler import Scheduler
from octavo.server.engine.core import EngineCore
from octavo.server.engine.messages import GenerateRequest

BLOCK = 16


def generate(
    path: Path, backend: str, requests: Sequence[GenerateRequest], *, max_model_len: int, budget: int, per_step: int
) -> tuple[dict[tuple[str, int], list[int]], ModelRunner]:
    """The tokens of every sample, of requests that arrive `per_step` a step; at most 16 of them run at once."""
    runner = ModelRunner(
        ModelConfig(path=str(path), dtype="float32", device="cpu", kernel_backend=backend), block_size=BLOCK
    )
    plan = runner.allocate_cache(
        kv_cache_memory=2**22, max_num_seqs=16, max_model_len=max_model_len, max_num_batched_tokens=budget
    )
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=16), CacheConfig(block_size=BLOCK),
        pools=[PoolConfig(pool.num_blocks, pool.window) for pool in plan.pools],
        max_model_len=plan.max_model_len, max_num_batched_tokens=budget, eos_token_ids=(),
    )  # fmt: skip
    core, pending = EngineCore(scheduler, runner), list(requests)
    tokens: dict[tuple[str, int], list[int]] = {}
    while pending or core.has_work:
        for request in pending[:per_step]:
            core.add(request)
        pending = pending[per_step:]
        for output in core.step().outputs:
            assert output.error is None
            tokens.setdefault((output.request_id, output.sample_index), []).extend(output.token_ids)
    core.idle()
    return tokens, runner
