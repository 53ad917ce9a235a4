"""Every family against transformers, through the whole engine: mixed batches, prompts in chunks, prefixes from the
cache, and contexts longer than the windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_models import CASES, Family, assert_answers_equal, open_engine, prompts, save_family
from octavo.kernels.cpu.library import supported_isas
from octavo.model.kv_layout import kv_layout
from octavo.model.weights.open import open_weights

LENGTHS = (3, 90, 31, 1, 64, 120, 17)
NUM_OUTPUT_TOKENS = 12
LONGROPE = ("phi3 longrope", "phi4 mini")
no_native = pytest.mark.skipif(not supported_isas(), reason="the native library was not built")
backends = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=no_native)])


@backends
@pytest.mark.parametrize("case", [case for case in CASES if case not in LONGROPE])
def test_greedy_answers_equal_transformers(
    tmp_path: Path, case: str, backend: str, proves: Callable[..., None]
) -> None:
    family = save_family(case, tmp_path)
    engine = open_engine(tmp_path, kernel_backend=backend)
    assert engine.notes == []  # a step of any family can be recorded
    asked = prompts(LENGTHS)
    assert_answers_equal(family, asked, engine.answer(asked, NUM_OUTPUT_TOKENS))
    # Once more, and longer: what the first round left in the cache is used.
    longer = [prompt + prompts([20], seed=1)[0] for prompt in asked]
    again = engine.answer(longer, NUM_OUTPUT_TOKENS, seed=1)
    assert_answers_equal(family, longer, again)
    assert any(answer.num_cached > 0 for answer in again)
    ready = engine.client.ready
    proves(architecture=ready.architecture, path="native", weights="safetensors", backend=ready.backend.split()[0])


ONE_OF_EACH = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3 moe",
    "mixtral",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "olmoe",
    "granite",
)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_the_kernels_for_gpus_give_the_same_answers(tmp_path: Path, case: str, proves: Callable[..., None]) -> None:
    """Under Triton's interpreter, which is slow: a prompt in two chunks beyond the window, and a token alone."""
    family = save_family(case, tmp_path)
    engine = open_engine(tmp_path, kernel_backend="triton", budget=32)
    asked = prompts((40, 1))
    assert_answers_equal(family, asked, engine.answer(asked, 3))
    ready = engine.client.ready
    proves(architecture=ready.architecture, path="native", weights="safetensors", backend=ready.backend.split()[0])


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_preempted_sequences_go_on_as_if_nothing_had_happened(tmp_path: Path, case: str) -> None:
    family = save_family(case, tmp_path)
    layout = kv_layout(open_weights(str(tmp_path)).spec)
    # One block less than two of the longest sequences hold, and the one that is nobody's.
    num_blocks = 2 * max(group.layer.blocks_of_sequence(100, 16) for group in layout.groups)
    engine = open_engine(tmp_path, kv_cache_memory=num_blocks * layout.block_bytes(16, 4), max_model_len=100)
    asked = prompts((40, 44, 30, 47))
    assert_answers_equal(family, asked, engine.answer(asked, 40))
    assert engine.core.scheduler.counters.num_preemptions > 0


@backends
@pytest.mark.parametrize("case", LONGROPE)
@pytest.mark.parametrize(("max_model_len", "lengths"), [(64, (3, 50, 31)), (None, (70, 130, 65))])
def test_the_longest_context_decides_between_the_two_rotations_of_longrope(
    tmp_path: Path, case: str, backend: str, max_model_len: int | None, lengths: tuple[int, ...]
) -> None:
    """transformers looks at each sequence; for sequences on the same side of the edge the two agree."""
    family = save_family(case, tmp_path)
    asked = prompts(lengths)
    engine = open_engine(tmp_path, kernel_backend=backend, max_model_len=max_model_len)
    answers = engine.answer(asked, NUM_OUTPUT_TOKENS)
    assert_answers_equal(family, asked, answers)


@backends
@pytest.mark.parametrize("case", ["gemma2", "gemma3", "granite", "olmo2", "qwen3 moe"])
def test_bfloat16_stays_close_to_transformers(tmp_path: Path, case: str, backend: str) -> None:
    """Not bit for bit: the two round in different places. The distributions agree nevertheless."""
    saved = save_family(case, tmp_path, initializer_range=0.05)
    family = Family(saved.oracle.to(torch.bfloat16), tmp_path)
    (prompt,) = prompts([70])
    (answer,) = open_engine(tmp_path, kernel_backend=backend, dtype="bfloat16").answer([prompt], 4)
    expected = family.logits([*prompt, *answer.token_ids])[len(prompt) - 1 : -1].softmax(-1)
    for row, found in zip(expected, answer.logprobs, strict=True):
        ids = list(found)
        torch.testing.assert_close(torch.tensor([found[i] for i in ids]).exp(), row[ids], rtol=0.15, atol=2e-3)
