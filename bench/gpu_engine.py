"""End to end, for bench/gpu.py: the server's own engine in this process, random weights of real shapes, steady decodes.

Requests of random tokens are all prefilled first; then steps of nothing but decodes are timed, and after that some more
under torch's profiler, which says for how long the card was busy. Prompts never repeat, so no prefix is ever found.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

from gpu_measure import GIB, Row, Setting, State, attempt
from gpu_profile import busy_seconds
from octavo.model.config import ModelConfig
from octavo.model.kv_cache import bytes_per_block
from octavo.model.registry import model_family
from octavo.model.runner import ModelRunner
from octavo.model.spec import ModelSpec, RopeSpec
from octavo.model.weights.dummy import DummySource
from octavo.scheduler.config import CacheConfig, PoolConfig, SchedulerConfig
from octavo.scheduler.sampling_params import SamplingParams
from octavo.scheduler.scheduler import Scheduler
from octavo.server.bench.roofline import StepShape, floor, model_cost, step_cost
from octavo.server.engine.core import EngineCore
from octavo.server.engine.messages import GenerateRequest, StepOutput

BLOCK = 32
_SPARE_BYTES = 8 * GIB
"""Of the card's memory, for activations, logits, graphs and whatever else runs."""


def llama3_rope(head_dim: int, factor: float) -> RopeSpec:
    return RopeSpec(
        theta=500000.0, rotary_dim=head_dim, kind="llama3", factor=factor, original_max_position_embeddings=8192
    )


LLAMA_1B = ModelSpec(
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope=llama3_rope(64, 32.0),
    max_position_embeddings=131072,
    tie_word_embeddings=True,
)
LLAMA_8B = ModelSpec(
    architecture="LlamaForCausalLM",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope=llama3_rope(128, 8.0),
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
TOY = ModelSpec(
    architecture="LlamaForCausalLM",
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope=RopeSpec(rotary_dim=16),
    max_position_embeddings=256,
    tie_word_embeddings=True,
)


@dataclass(frozen=True, slots=True)
class Load:
    """`batch` requests of `context` prompt tokens each."""

    batch: int
    context: int
    params: str = "greedy"

    @property
    def label(self) -> str:
        return f"{self.batch} × {self.context}" + ("" if self.params == "greedy" else f", {self.params}")


SAMPLING = {
    "greedy": {"temperature": 0.0},
    "top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
}


@dataclass(frozen=True, slots=True)
class Steps:
    """How many decode steps are run for what."""

    warm: int
    """Before any is timed: a shape is captured when it is met for the second time."""
    timed: int
    profiled: int

    budget: int
    """Tokens of one step."""

    def tokens(self, load: Load) -> int:
        """That each request may generate: also while others are still being prefilled, and in the step ahead."""
        prefill = 2 * -(-load.batch * load.context // self.budget) + 8
        return prefill + self.warm + self.timed + self.profiled + 8


def models(setting: Setting) -> dict[str, ModelSpec]:
    if setting.dry:
        return {"toy": TOY}
    return {"Llama-3.1-8B": LLAMA_8B} if setting.quick else {"Llama-3.2-1B": LLAMA_1B, "Llama-3.1-8B": LLAMA_8B}


def loads(setting: Setting) -> list[Load]:
    if setting.dry:
        return [Load(1, 16), Load(2, 16, "top-p 0.95")]
    if setting.quick:
        return [Load(1, 1024), Load(32, 1024), Load(256, 1024)]
    return [
        Load(1, 1024), Load(32, 1024), Load(128, 1024), Load(256, 1024), Load(32, 4096), Load(256, 1024, "top-p 0.95")
    ]  # fmt: skip


def steps(setting: Setting) -> Steps:
    return Steps(2, 2, 1, 64) if setting.dry else Steps(8, 64, 20, 8192)


def case_name(model: str, load: Load) -> str:
    return f"{model}, {load.label}"


def run(state: State) -> Iterator[Row]:
    setting = state.setting
    for name, spec in models(setting).items():
        if state.clock.left <= 0:
            yield Row("engine", name, notes=["skipped: out of time"])
            continue
        engines: list[EngineBench] = []
        started = time.perf_counter()
        row = attempt(
            Row("engine", f"{name}, load"),
            lambda _, s=spec, e=engines: e.append(EngineBench(s, setting)),  # type: ignore[misc]
        )
        row.values["load_s"] = time.perf_counter() - started
        row.notes.append(f"{row.values['load_s']:.1f} s for weights and pool")
        yield row
        if not engines:
            continue
        engine = engines.pop()
        for load in loads(setting):
            row = Row("engine", case_name(name, load), unit="tok/s")
            if state.clock.left <= 0 or not engine.fits(load):
                row.notes.append(
                    f"skipped: {'out of time' if state.clock.left <= 0 else 'more K/V than there is room'}"
                )
                yield row
                continue
            yield attempt(row, lambda row, e=engine, one=load: e.measure(row, state, one))  # type: ignore[misc]
        del engine


class EngineBench:
    """Runner, scheduler and core, as `octavo serve` puts them together, without a process or a socket between."""

    def __init__(self, spec: ModelSpec, setting: Setting) -> None:
        self._setting = setting
        self._steps = steps(setting)
        dtype = "float32" if setting.dry else "bfloat16"
        config = ModelConfig(path="dummy", dtype=dtype, device=setting.device.type, kernel_backend="triton")  # type: ignore[arg-type]
        self._runner = ModelRunner(config, block_size=BLOCK, source=DummySource(spec))
        self._block_bytes = bytes_per_block(spec, BLOCK, self._runner.backend.dtype)
        wanted = loads(setting)
        room = setting.free_bytes() - (0 if setting.dry else _SPARE_BYTES)
        self._num_blocks = min(max(map(self._blocks, wanted)), room // self._block_bytes)
        plan = self._runner.allocate_cache(
            kv_cache_memory=self._num_blocks * self._block_bytes,
            max_num_seqs=max(load.batch for load in wanted),
            max_model_len=max(load.context + self._steps.tokens(load) for load in wanted),
            max_num_batched_tokens=self._steps.budget,
        )
        scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=max(load.batch for load in wanted)),
            CacheConfig(block_size=BLOCK),
            pools=[PoolConfig(pool.num_blocks, pool.window) for pool in plan.pools],
            max_model_len=plan.max_model_len,
            max_num_batched_tokens=self._steps.budget,
        )
        self._core = EngineCore(scheduler, self._runner)
        self._random = random.Random(setting.seed)
        self._num_loads = 0
        backend, named = self._runner.backend, model_family(spec.architecture).parameters(spec)
        parameters = [
            (name, shape, backend.weight_bytes([stored]))
            for (name, shape), stored in zip(named, self._runner.weights, strict=True)
        ]
        self._cost = model_cost(spec, parameters, backend.dtype.itemsize)
        self._vocab_size = spec.vocab_size

    def _blocks(self, load: Load) -> int:
        """Of the pool: what all requests hold at their end, the one in reserve for each, and block 0."""
        return load.batch * (-(-(load.context + self._steps.tokens(load)) // BLOCK) + 1) + 1

    def fits(self, load: Load) -> bool:
        return self._blocks(load) <= self._num_blocks

    def measure(self, row: Row, state: State, load: Load) -> None:
        self._submit(load)
        try:
            row.values["prefill_tokens_per_s"] = self._prefill(load)
            for _ in range(self._steps.warm):
                self._step()
            before = self._mean_context()
            wall, outputs = self._timed(load)
            context = round((before + self._mean_context()) / 2)
            busy = busy_seconds(self._step, self._steps.profiled, self._setting)
        finally:
            self._end(load)
        cost = step_cost(self._cost, StepShape(load.batch, context, 1))
        limit = floor(cost, state.ceilings.copy, state.ceilings.matmul)
        row.seconds = statistics.mean(wall)
        row.rate, row.fraction = load.batch / row.seconds, limit.seconds / row.seconds
        host = {
            "schedule_and_launch_s": statistics.mean(
                o.stats.schedule_seconds + o.stats.forward_seconds for o in outputs
            ),
            "update_s": statistics.mean(o.stats.update_seconds for o in outputs),
        }
        row.values |= {
            "tokens_per_s": row.rate,
            "roofline_tokens_per_s": load.batch / limit.seconds,
            "step_median_s": statistics.median(wall),
            "step_worst_s": max(wall),
            "host_s": sum(host.values()),
            **host,
            "gpu_busy_s": busy.per_step,
            "gpu_idle_s": row.seconds - busy.per_step,
            "kernels_s": busy.kernels,
            "step_bytes": cost.num_bytes,
            "mean_context": context,
        }
        row.notes += [
            f"of {load.batch / limit.seconds:,.0f} tok/s",
            f"GPU idle {1e6 * (row.seconds - busy.per_step):.0f} µs",
            f"host {1e3 * sum(host.values()):.2f} ms",
            f"prefill {row.values['prefill_tokens_per_s']:,.0f} tok/s",
        ]

    def _submit(self, load: Load) -> None:
        self._num_loads += 1
        params = SamplingParams(ignore_eos=True, max_tokens=self._steps.tokens(load), **SAMPLING[load.params])  # type: ignore[arg-type]
        for index in range(load.batch):
            prompt = [self._random.randrange(self._vocab_size) for _ in range(load.context)]
            self._core.add(
                GenerateRequest(request_id=f"{self._num_loads}-{index}", prompt_token_ids=prompt, params=params)
            )

    def _end(self, load: Load) -> None:
        for index in range(load.batch):
            self._core.abort(f"{self._num_loads}-{index}")
        while self._core.has_work:
            self._core.step()
        self._core.idle()

    def _mean_context(self) -> float:
        return statistics.mean(request.num_computed_tokens for request in self._core.scheduler.running)

    def _step(self) -> StepOutput:
        output = self._core.step()
        for token in output.outputs:
            if token.error is not None:
                raise RuntimeError(token.error.message)
        return output

    def _prefill(self, load: Load) -> float:
        """Run until all requests decode. Prompt tokens per second, the median over steps that were full of them."""
        rates: list[tuple[int, float]] = []
        while True:
            started = time.perf_counter()
            stats = self._step().stats
            if stats.num_prompt_tokens:
                rates.append((stats.num_prompt_tokens, stats.num_prompt_tokens / (time.perf_counter() - started)))
            elif stats.num_running == load.batch and not stats.num_waiting:
                break
            elif not self._core.has_work:
                raise RuntimeError("the requests ended before all of them decoded")
        most = max(tokens for tokens, _ in rates)
        return statistics.median(rate for tokens, rate in rates if 2 * tokens > most)

    def _timed(self, load: Load) -> tuple[list[float], list[StepOutput]]:
        """Seconds between the ends of steps, and what they put out. No synchronising: one step always runs ahead."""
        wall, outputs = [], []
        before = time.perf_counter()
        for _ in range(self._steps.timed):
            outputs.append(self._step())
            now = time.perf_counter()
            wall.append(now - before)
            before = now
        drawn = {len(output.outputs) for output in outputs}
        if drawn != {load.batch}:
            raise RuntimeError(f"steps of {load.batch} sequences drew {sorted(drawn)} tokens")
        return wall, outputs
