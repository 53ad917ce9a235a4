"""From an EngineConfig to a running core: load the model, size the pool, warm up. Imports torch."""

from __future__ import annotations

import time
from collections.abc import Callable

from ...model.runner import ModelRunner
from ...scheduler.batch import ScheduledBatch, ScheduledRow
from ...scheduler.config import PoolConfig
from ...scheduler.sampling_params import SamplingParams
from ...scheduler.scheduler import Scheduler
from ..config import EngineConfig
from .core import EngineCore
from .messages import EngineReady


def build_engine(
    config: EngineConfig, *, progress: Callable[[str, float], None] | None = None
) -> tuple[EngineCore, EngineReady]:
    """Load, allocate, warm up. Raises ModelError (one line, with the mend) if the model cannot be served.

    `progress(phase, fraction)` is called while weights load.
    """
    runner = ModelRunner(config.model, block_size=config.cache.block_size, progress=progress)
    budget = config.scheduler.max_num_batched_tokens or runner.default_max_num_batched_tokens
    phases = dict(runner.phases)
    started = time.perf_counter()
    plan = runner.allocate_cache(
        kv_cache_memory=config.cache.kv_cache_memory,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_model_len=config.model.max_model_len,
        max_num_batched_tokens=budget,
    )
    phases["pool"] = time.perf_counter() - started
    started = time.perf_counter()
    _warm_up(runner)
    phases["warm-up"] = time.perf_counter() - started
    scheduler = Scheduler(
        config.scheduler,
        config.cache,
        pools=[PoolConfig(pool.num_blocks, pool.window) for pool in plan.pools],
        max_model_len=plan.max_model_len,
        max_num_batched_tokens=budget,
        eos_token_ids=runner.spec.eos_token_ids,
        seed=config.model.seed,
    )
    notes = [*runner.notes, *plan.notes]
    if config.model.load_format == "dummy":
        notes.append("the weights are random (load format dummy): what the model says is noise")
    ready = EngineReady(
        max_model_len=plan.max_model_len,
        max_num_seqs=scheduler.max_num_running,
        max_num_waiting=config.scheduler.max_num_waiting,
        max_num_batched_tokens=budget,
        block_size=config.cache.block_size,
        num_blocks=plan.num_usable_blocks,
        pool_blocks=plan.usable_blocks,
        kv_cache_bytes=plan.kv_cache_bytes,
        weight_bytes=runner.weight_bytes,
        vocab_size=runner.spec.vocab_size,
        eos_token_ids=list(runner.spec.eos_token_ids),
        prefix_caching=config.cache.enable_prefix_caching,
        architecture=runner.spec.architecture,
        dtype=str(runner.backend.dtype).removeprefix("torch."),
        device=str(runner.backend.device),
        backend=runner.backend_label,
        phases=phases,
        notes=notes,
    )
    return EngineCore(scheduler, runner, probe=lambda: _warm_up(runner)), ready


def _warm_up(runner: ModelRunner) -> None:
    """One tiny step of a prompt and one of a decode into the reserved block: first calls allocate and select code
    paths, which the first user should not wait for."""
    params = SamplingParams(temperature=1.0, top_p=0.9)
    for num_computed, num_tokens in ((0, 4), (4, 5)):
        row = ScheduledRow(
            "warm-up/0", [0] * num_tokens, num_tokens, num_computed, num_tokens - num_computed,
            ([0],) * runner.num_groups, params, 0,
        )  # fmt: skip
        runner.execute(ScheduledBatch([row], num_decode_rows=int(num_tokens - num_computed == 1)))
    runner.release(["warm-up/0"])
