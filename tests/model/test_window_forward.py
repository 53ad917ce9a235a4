"""Models whose layers see a window, beyond it: the tokens of transformers, while blocks are given back and overwritten.

The engine runs as it does in a server. After every step all blocks that nobody holds are filled with NaN, so whatever
reads one of them ends its request.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from octavo.model.config import ModelConfig
from octavo.model.runner import ModelRunner
from octavo.model.spec import ModelSpec, RopeSpec
from octavo.model.weights.source import WeightSource
from octavo.scheduler.config import CacheConfig, PoolConfig, SchedulerConfig
from octavo.scheduler.sampling_params import SamplingParams
from octavo.scheduler.scheduler import Scheduler
from octavo.server.engine.core import EngineCore
from octavo.server.engine.messages import GenerateRequest
from transformers import Qwen2Config
from transformers import Qwen2ForCausalLM as TransformersQwen2

BLOCK = 16
VOCAB = 160
PATTERNS = {
    "every_layer": ["sliding_attention"] * 2,
    "every_other_layer": ["sliding_attention", "full_attention", "sliding_attention"],
}


@dataclass
class WindowedEngine:
    oracle: TransformersQwen2
    runner: ModelRunner
    core: EngineCore
    poisons: bool
    """Only without the prefix cache: what is free may not be found again."""

    def run(self, *requests: GenerateRequest) -> dict[str, list[int]]:
        for request in requests:
            self.core.add(request)
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        while self.core.has_work:
            for output in self.core.step().outputs:
                assert output.error is None
                tokens[output.request_id] += output.token_ids
            if self.poisons:
                self.poison()
        return tokens

    def poison(self) -> None:
        for group, pool in zip(self.core.scheduler.blocks.groups, self.runner.kv_pools, strict=True):
            pool[:, [0, *(block.id for block in group.pool.free_list)]] = float("nan")

    def expected(self, request: GenerateRequest, said: list[int]) -> list[int]:
        """What transformers would say, every token after the ones that were said before it."""
        prompt = list(request.prompt_token_ids)
        with torch.inference_mode():
            logits = self.oracle(torch.tensor([prompt + said])).logits[0]
        choices: list[int] = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        return choices


def make_oracle(window: int, pattern: str) -> TransformersQwen2:
    """A Llama whose layers have windows: transformers has that as Qwen2, if its biases are zero."""
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=len(PATTERNS[pattern]),
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
        sliding_window=window, use_sliding_window=True, layer_types=PATTERNS[pattern], tie_word_embeddings=True,
    )  # fmt: skip
    oracle = TransformersQwen2(config).eval()
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return oracle


def spec_of(window: int, pattern: str) -> ModelSpec:
    return ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=len(PATTERNS[pattern]),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope=RopeSpec(rotary_dim=16),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        windows=tuple(window if kind == "sliding_attention" else 0 for kind in PATTERNS[pattern]),
    )


@pytest.fixture
def make_engine(memory_source: Callable[..., WeightSource]) -> Callable[..., WindowedEngine]:
    def make(
        window: int,
        pattern: str,
        *,
        backend: str = "reference",
        caching: bool = False,
        num_blocks: tuple[int, ...] = (),
    ) -> WindowedEngine:
        oracle = make_oracle(window, pattern)
        state = {name: tensor for name, tensor in oracle.state_dict().items() if not name.endswith("bias")}
        settings = ModelConfig(path="in memory", dtype="float32", device="cpu", kernel_backend=backend)
        runner = ModelRunner(settings, block_size=BLOCK, source=memory_source(spec_of(window, pattern), state))
        plan = runner.allocate_cache(
            kv_cache_memory=2**22, max_num_seqs=4, max_model_len=256, max_num_batched_tokens=48
        )
        sizes = num_blocks or [pool.num_blocks for pool in plan.pools]
        scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=4),
            CacheConfig(block_size=BLOCK, enable_prefix_caching=caching),
            pools=[PoolConfig(size, pool.window) for size, pool in zip(sizes, plan.pools, strict=True)],
            max_model_len=256,
            max_num_batched_tokens=48,
        )
        return WindowedEngine(oracle, runner, EngineCore(scheduler, runner), poisons=not caching)

    return make


def request(name: str, num_tokens: int, max_tokens: int = 20, seed: int = 0, **params: Any) -> GenerateRequest:
    rng = random.Random(seed)
    return GenerateRequest(
        request_id=name,
        prompt_token_ids=[rng.randrange(3, VOCAB) for _ in range(num_tokens)],
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **params),
    )


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("window", [5, 16, 40])
def test_tokens_beyond_the_window_are_those_of_transformers(make_engine, window, pattern):
    """Prompts in parts, several at once, shorter and longer than the window."""
    engine = make_engine(window, pattern)
    requests = [request(f"r{n}", n, seed=n) for n in (3, 110, 33)]
    found = engine.run(*requests)
    for asked in requests:
        assert len(found[asked.request_id]) == 20
        assert found[asked.request_id] == engine.expected(asked, found[asked.request_id])
    for group in engine.core.scheduler.blocks.groups:
        assert group.pool.num_free == group.pool.num_usable


def test_the_backend_that_runs_ahead_reads_no_more(make_engine):
    """Through captured decode steps, whose tables lie on the device."""
    engine = make_engine(12, "every_other_layer", backend="triton")
    assert engine.runner.runs_ahead
    requests = [request("short", 9, 14, seed=1), request("long", 40, 6, seed=2)]
    found = engine.run(*requests)
    for asked in requests:
        assert found[asked.request_id] == engine.expected(asked, found[asked.request_id])


def test_a_prefix_is_found_by_its_window(make_engine):
    """The second question goes on from the first: of windowed layers only the last blocks are needed, and there."""
    engine = make_engine(20, "every_other_layer", caching=True)
    first = request("first", 100)
    said = engine.run(first)["first"]
    second = GenerateRequest(
        request_id="second",
        prompt_token_ids=[*first.prompt_token_ids, *said, 7, 8, 9],
        params=first.params,
    )
    found = engine.run(second)["second"]
    assert found == engine.expected(second, found)
    counters = engine.core.scheduler.counters
    assert counters.prefix_cache_hits == (100 + 20 - 1) // BLOCK * BLOCK


def test_pools_that_are_short_preempt_and_go_on(make_engine):
    """Of windowed layers just enough for one sequence: 3 blocks of window, and one for a part of a prompt."""
    engine = make_engine(20, "every_other_layer", num_blocks=(17, 5))
    requests = [request(f"r{n}", n, seed=n) for n in (90, 60)]
    found = engine.run(*requests)
    for asked in requests:
        assert found[asked.request_id] == engine.expected(asked, found[asked.request_id])


def test_samples_of_a_long_prompt_share_its_window(make_engine):
    engine = make_engine(20, "every_other_layer")
    asked = request("r", 75, 10, n=3)
    found = engine.run(asked)["r"]
    alone = engine.run(request("r", 75, 10))["r"]
    assert sorted(found) == sorted(alone * 3)
