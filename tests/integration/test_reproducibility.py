"""The promise of docs/reproducibility.md: on the native CPU backend a request's greedy tokens and logprobs are the same
bits, whatever is computed beside it, before it, and in how many pieces."""

from __future__ import annotations

import random
from typing import Any

import pytest
from octavo.kernels.cpu.library import supported_isas
from octavo.scheduler.sampling_params import SamplingParams
from octavo.server.llm import LLM, Generation

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(not supported_isas(), reason="the native library was not built"),
]

OPENING = "It was a bright cold day in April, and the clocks were striking thirteen. " * 4
PROMPTS = [
    "The capital of France is",
    "1, 2, 3, 4, 5,",
    OPENING + "Winston Smith,",
    OPENING + "The hallway smelt of",
    "def fibonacci(n):\n",
    "What is the capital of France?",
    "Once upon a time",
]
PARAMS = SamplingParams(temperature=0, max_tokens=24, logprobs=3, ignore_eos=True)


def answers(llm: LLM, prompts: list[str]) -> dict[str, tuple[Any, ...]]:
    """Prompt → its tokens and every log probability, bit by bit."""
    return {
        prompt: facts(result)
        for prompt, result in zip(prompts, llm.generate(prompts, PARAMS, progress=False), strict=True)
    }


def facts(result: Generation) -> tuple[Any, ...]:
    (completion,) = result.completions
    assert completion.logprobs is not None
    return tuple(completion.token_ids), tuple(
        (tuple(entry.token_ids), tuple(value.hex() for value in entry.logprobs)) for entry in completion.logprobs
    )


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def alone(dtype: Any) -> dict[str, tuple[Any, ...]]:
    """Each prompt by itself, in one piece, with nothing cached."""
    llm = LLM(dtype=dtype, kv_cache_memory=2**28, max_num_seqs=1, enable_prefix_caching=False)
    assert llm.ready.backend.startswith("cpu")
    return {prompt: answer for one in PROMPTS for prompt, answer in answers(llm, [one]).items()}


@pytest.mark.parametrize("max_num_seqs", [2, 7, 16])
def test_neighbours_change_nothing(dtype: Any, alone: dict[str, tuple[Any, ...]], max_num_seqs: int) -> None:
    llm = LLM(dtype=dtype, kv_cache_memory=2**28, max_num_seqs=max_num_seqs)
    order = PROMPTS * (1 + max_num_seqs // 8)
    for seed in range(2):  # the second time around the prefix cache answers
        random.Random(seed).shuffle(order)
        assert answers(llm, order) == alone


def test_chunks_of_prompts_change_nothing(dtype: Any, alone: dict[str, tuple[Any, ...]]) -> None:
    for num_tokens in (7, 50):
        llm = LLM(dtype=dtype, kv_cache_memory=2**28, max_num_batched_tokens=num_tokens, enable_prefix_caching=False)
        assert answers(llm, PROMPTS) == alone


def test_preemption_changes_nothing(dtype: Any, alone: dict[str, tuple[Any, ...]]) -> None:
    itemsize = 2 if dtype == "bfloat16" else 4
    block_bytes = 30 * 2 * 3 * 16 * 64 * itemsize
    llm = LLM(
        dtype=dtype, kv_cache_memory=16 * block_bytes, block_size=16, max_num_seqs=8, max_model_len=160,
        enable_prefix_caching=False,
    )  # fmt: skip
    assert answers(llm, PROMPTS) == alone
    assert llm._client.core.scheduler.counters.num_preemptions > 0
