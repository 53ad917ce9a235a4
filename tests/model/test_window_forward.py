"""Models whose layers see a window, far beyond it: the tokens of transformers, while blocks are given back and spoilt.

The engine runs as it does in a server. After every step all blocks whose contents nobody may look at are filled with
NaN, the reserved one included, so whatever reads one of them ends its request.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from octavo.kernels.cpu.library import load_library, supported_isas
from octavo.model.config import ModelConfig
from octavo.model.runner import ModelRunner
from octavo.scheduler.config import CacheConfig, PoolConfig, SchedulerConfig
from octavo.scheduler.sampling_params import SamplingParams
from octavo.scheduler.scheduler import Scheduler
from octavo.server.engine.core import EngineCore
from octavo.server.engine.messages import GenerateRequest

BLOCK = 16
VOCAB = 160
MAX_LEN = 256
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Every layer has the window.
    "mistral": ("MistralConfig", "MistralForCausalLM", {"num_hidden_layers": 2}),
    # Some have, and those that see everything have rotations of their own.
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}
WITHOUT_NATIVE = pytest.mark.skipif(load_library() is None or not supported_isas(), reason="no native library")
BACKENDS = ["reference", pytest.param("cpu", marks=WITHOUT_NATIVE)]


@dataclass
class WindowedEngine:
    oracle: Any
    runner: ModelRunner
    core: EngineCore

    def run(self, *requests: GenerateRequest) -> dict[str, list[int]]:
        """Each request's tokens."""
        for request in requests:
            self.core.add(request)
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        while self.core.has_work:
            for output in self.core.step().outputs:
                assert output.error is None
                tokens[output.request_id] += output.token_ids
            self._spoil()
        return tokens

    def _spoil(self) -> None:
        """What is free and cannot be found by its hash, and the reserved block of each pool."""
        for group, pool in zip(self.core.scheduler.blocks.groups, self.runner.kv_pools, strict=True):
            free = [block.id for block in group.pool.free_list if block.hash is None]
            pool[:, [0, *free]] = float("nan")

    def check(self, request: GenerateRequest, said: Sequence[int]) -> None:
        """Every token is what transformers says after those that were said before it."""
        prompt = list(request.prompt_token_ids)
        assert len(said) == request.params.max_tokens
        with torch.inference_mode():
            logits = self.oracle(torch.tensor([[*prompt, *said]])).logits[0]
        assert list(said) == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


pytestmark = pytest.mark.usefixtures("one_thread")
MakeEngine = Callable[..., WindowedEngine]


@pytest.fixture
def make_engine(tmp_path: Path) -> MakeEngine:
    def make(
        model: str,
        window: int,
        backend: str = "reference",
        *,
        caching: bool = False,
        num_blocks: Sequence[int] = (),
        max_num_seqs: int = 4,
    ) -> WindowedEngine:
        """`num_blocks` of each pool, block 0 included; else as many as the memory plan makes."""
        config_name, model_name, settings = MODELS[model]
        torch.manual_seed(3)
        config = getattr(transformers, config_name)(**{**COMMON, **settings, "sliding_window": window})
        oracle = getattr(transformers, model_name)(config).eval()
        oracle.save_pretrained(tmp_path)
        settings = ModelConfig(path=str(tmp_path), dtype="float32", device="cpu", kernel_backend=backend)
        runner = ModelRunner(settings, block_size=BLOCK)
        plan = runner.allocate_cache(
            kv_cache_memory=2**22, max_num_seqs=max_num_seqs, max_model_len=MAX_LEN, max_num_batched_tokens=48
        )
        assert plan.max_model_len == MAX_LEN > window
        assert runner.notes == []  # nothing falls back to running operator by operator
        sizes = num_blocks or [pool.num_blocks for pool in plan.pools]
        scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=max_num_seqs),
            CacheConfig(block_size=BLOCK, enable_prefix_caching=caching),
            pools=[PoolConfig(size, pool.window) for size, pool in zip(sizes, plan.pools, strict=True)],
            max_model_len=MAX_LEN,
            max_num_batched_tokens=48,
        )
        return WindowedEngine(oracle, runner, EngineCore(scheduler, runner))

    return make


def tokens(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(count)]


def request(name: str, prompt: Sequence[int], max_tokens: int = 20, **params: Any) -> GenerateRequest:
    return GenerateRequest(
        request_id=name,
        prompt_token_ids=list(prompt),
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **params),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("window", [5, 16, 40])
def test_tokens_beyond_the_window_are_those_of_transformers(
    make_engine: MakeEngine, model: str, window: int, backend: str
) -> None:
    """Prompts in parts, several at once, shorter than the window and many times as long."""
    engine = make_engine(model, window, backend)
    requests = [request(f"r{n}", tokens(n, seed=n)) for n in (3, 210, 33)]
    found = engine.run(*requests)
    for asked in requests:
        engine.check(asked, found[asked.request_id])
    for group in engine.core.scheduler.blocks.groups:
        assert group.pool.num_free == group.pool.num_usable


def test_the_backend_that_runs_ahead_reads_no_more(make_engine: MakeEngine) -> None:
    """Through captured decode steps, whose tables lie on the device."""
    engine = make_engine("gemma3", 12, "triton")
    assert engine.runner.runs_ahead
    requests = [request("short", tokens(9, seed=1), 8), request("long", tokens(30, seed=2), 4)]
    found = engine.run(*requests)
    for asked in requests:
        engine.check(asked, found[asked.request_id])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", MODELS)
def test_a_prefix_is_found_by_its_window(make_engine: MakeEngine, model: str, backend: str) -> None:
    """The second question goes on from the first: of windowed layers only the last blocks are needed, and there."""
    engine = make_engine(model, 20, backend, caching=True)
    first = request("first", tokens(100))
    said = engine.run(first)["first"]
    second = request("second", [*first.prompt_token_ids, *said, 7, 8, 9])
    engine.check(second, engine.run(second)["second"])
    assert engine.core.scheduler.counters.prefix_cache_hits == (100 + 20 - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("model", "num_blocks"), [("mistral", (6,)), ("gemma3", (17, 6))])
@pytest.mark.parametrize("caching", [False, True])
def test_pools_that_are_short_preempt_and_go_on(
    make_engine: MakeEngine, model: str, num_blocks: tuple[int, ...], caching: bool, backend: str
) -> None:
    """Of windowed layers enough for one sequence: 3 blocks of window, and two for a part of a prompt. Three short
    questions begin with a block each, and their answers want two. The last question begins as the one before."""
    engine = make_engine(model, 20, backend, num_blocks=num_blocks, caching=caching)
    prompts = [tokens(4, seed=2), tokens(6, seed=3), tokens(5, seed=4), tokens(40, seed=1), tokens(90, seed=1)]
    requests = [request(f"r{n}", prompt, 20) for n, prompt in enumerate(prompts)]
    found = engine.run(*requests)
    for asked in requests:
        engine.check(asked, found[asked.request_id])
    counters = engine.core.scheduler.counters
    assert counters.num_preemptions > 0
    assert (counters.prefix_cache_hits > 0) is caching


def test_samples_of_a_long_prompt_share_its_window(make_engine: MakeEngine) -> None:
    engine = make_engine("gemma3", 20)
    found = engine.run(request("r", tokens(75), 10, n=3))["r"]
    alone = engine.run(request("r", tokens(75), 10))["r"]
    assert sorted(found) == sorted(alone * 3)
