"""Shorter ways to decode: steps launched before the one before them has been looked at, and steps in one native call.
The engine's tokens must not show it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from octavo.kernels.cpu.library import supported_isas
from octavo.model.config import ModelConfig
from octavo.model.direct_decode import DirectDecode
from octavo.model.runner import ModelRunner
from octavo.scheduler.batch import PendingStep, ScheduledBatch
from octavo.scheduler.config import CacheConfig, PoolConfig, SchedulerConfig
from octavo.scheduler.sampling_params import SamplingParams
from octavo.scheduler.scheduler import Scheduler
from octavo.server.engine.core import EngineCore
from octavo.server.engine.messages import GenerateRequest
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as TransformersLlama

VOCAB = 64
BLOCK = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with two query heads for a K/V head. Under the interpreter a program of a kernel costs ten
    milliseconds, whatever it computes: one layer and one K/V head show what two do."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    TransformersLlama(config).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    return folder


def requests() -> list[GenerateRequest]:
    """Prompts of all lengths; greedy and drawn, penalised and biased rows, parallel samples, one that stops early."""
    generator = torch.Generator().manual_seed(1)
    kinds = [
        SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True),
        SamplingParams(temperature=0.9, seed=3, max_tokens=14, ignore_eos=True),
        SamplingParams(temperature=1.2, seed=4, top_k=9, top_p=0.8, max_tokens=10, ignore_eos=True),
        SamplingParams(temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.4, max_tokens=5),
        SamplingParams(temperature=0.8, seed=5, n=2, max_tokens=6),
        SamplingParams(temperature=0.0, logit_bias={7: 3.0}, logprobs=2, max_tokens=4),
        SamplingParams(temperature=0.7, seed=6, min_tokens=3, stop_token_ids=tuple(range(3, 40)), max_tokens=9),
        SamplingParams(temperature=0.0, max_tokens=1),
    ]
    lengths = [5, 14, 15, 24, 13, 1, 10, 16]
    return [
        GenerateRequest(
            request_id=f"r{index}",
            prompt_token_ids=torch.randint(3, VOCAB, (length,), generator=generator).tolist(),
            params=params,
        )
        for index, (length, params) in enumerate(zip(lengths, kinds, strict=True))
    ]


class CountedDirect:
    """A runner's way to decode in one call, which says how often it was taken; or never is."""

    def __init__(self, direct: DirectDecode | None) -> None:
        self._direct = direct
        self.num_steps = self.num_left = 0

    def launch(self, batch: ScheduledBatch) -> PendingStep | None:
        running = self._direct.launch(batch) if self._direct is not None else None
        self.num_steps += running is not None
        self.num_left += running is None and batch.only_decodes
        return running


def run(
    checkpoint: Path,
    backend: str,
    num_blocks: int,
    budget: int,
    *,
    block_size: int = BLOCK,
    use: Callable[[ModelRunner], object] = id,
) -> tuple[dict[tuple[str, int], list[int]], Scheduler]:
    """Requests arrive two per step; the tokens of every sample. `use` may change the runner."""
    config = ModelConfig(path=str(checkpoint), dtype="float32", device="cpu", kernel_backend=backend)
    runner = ModelRunner(config, block_size=block_size)
    assert runner.spec.eos_token_ids == (2,)
    block_bytes = 2 * 16 * block_size * 4
    plan = runner.allocate_cache(
        kv_cache_memory=num_blocks * block_bytes, max_num_seqs=8, max_model_len=64, max_num_batched_tokens=budget
    )
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=8),
        CacheConfig(block_size=block_size),
        pools=[PoolConfig(plan.pools[0].num_blocks)],
        max_model_len=plan.max_model_len,
        max_num_batched_tokens=budget,
        eos_token_ids=(2,),
    )
    use(runner)
    core = EngineCore(scheduler, runner)
    tokens: dict[tuple[str, int], list[int]] = {}
    pending = requests()
    while pending or core.has_work:
        for request in pending[:2]:
            core.add(request)
        pending = pending[2:]
        for output in core.step().outputs:
            assert output.error is None
            tokens.setdefault((output.request_id, output.sample_index), []).extend(output.token_ids)
    core.idle()
    counts = scheduler.blocks.counts()
    assert counts.num_free == counts.num_usable
    return tokens, scheduler


@pytest.mark.parametrize(("num_blocks", "budget"), [(40, 40), (12, 16)], ids=["ample", "with preemptions"])
def test_running_ahead_says_the_same(checkpoint: Path, num_blocks: int, budget: int) -> None:
    expected, _ = run(checkpoint, "reference", num_blocks, budget)
    found, scheduler = run(checkpoint, "triton", num_blocks, budget)
    assert found == expected
    assert len(found) == 9
    assert (scheduler.counters.num_preemptions > 0) == (num_blocks == 12)


@pytest.mark.skipif(not supported_isas(), reason="no native library")
@pytest.mark.parametrize(("num_blocks", "budget"), [(40, 40), (6, 16)], ids=["ample", "prompts in parts"])
def test_steps_in_one_call_say_the_same(checkpoint: Path, num_blocks: int, budget: int) -> None:
    """The rows that ask for logprobs, penalties or a least length are left to the other way, with their batch."""
    counted: list[CountedDirect] = []

    def count(runner: ModelRunner) -> None:
        counted.append(CountedDirect(runner._direct))
        runner._direct = counted[-1]  # type: ignore[assignment]

    def switch_off(runner: ModelRunner) -> None:
        runner._direct = None
        count(runner)

    expected, _ = run(checkpoint, "cpu", num_blocks, budget, block_size=16, use=switch_off)
    found, _ = run(checkpoint, "cpu", num_blocks, budget, block_size=16, use=count)
    assert found == expected
    without, with_it = counted
    assert without.num_steps == 0
    assert with_it.num_steps > 3
    assert with_it.num_left > 1
    assert with_it.num_steps + with_it.num_left == without.num_left
