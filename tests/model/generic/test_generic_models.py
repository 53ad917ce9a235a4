"""Models without a family of our own against transformers, through the whole engine: mixed batches, prompts in chunks,
prefixes from the cache, contexts longer than the windows, and a pool that is too small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_models import Family, assert_answers_equal, open_engine, prompts
from generic_models import GENERIC_CASES, save_generic
from octavo.model.weights.open import read_spec
from octavo.server.engine.messages import EngineReady

LENGTHS = (3, 90, 31, 1, 64, 120, 17)


def served_generically(ready: EngineReady) -> bool:
    return any(note.startswith("the generic path serves") for note in ready.notes)


@pytest.mark.parametrize("case", GENERIC_CASES)
def test_greedy_answers_equal_transformers(tmp_path: Path, case: str, proves: Callable[..., None]) -> None:
    family = save_generic(case, tmp_path)
    engine = open_engine(tmp_path)
    ready = engine.client.ready
    assert served_generically(ready)
    asked = prompts(LENGTHS)
    assert_answers_equal(family, asked, engine.answer(asked, 10))
    # Once more, and longer: what the first round left in the cache is used.
    longer = [prompt + prompts([20], seed=1)[0] for prompt in asked]
    again = engine.answer(longer, 10, seed=1)
    assert_answers_equal(family, longer, again)
    assert any(answer.num_cached > 0 for answer in again)
    proves(architecture=ready.architecture, path="generic", weights="safetensors", backend=ready.backend.split()[0])


@pytest.mark.parametrize("case", ["gpt neox", "cohere2"])
def test_answers_survive_preemption(tmp_path: Path, case: str) -> None:
    family = save_generic(case, tmp_path)
    spec = read_spec(str(tmp_path))
    block_bytes = 16 * spec.num_hidden_layers * 2 * spec.num_key_value_heads * spec.head_dim * 4
    engine = open_engine(tmp_path, kv_cache_memory=12 * block_bytes, max_model_len=100)
    asked = prompts((40, 44, 30, 47))
    answers = engine.answer(asked, 40)
    assert engine.core.scheduler.counters.num_preemptions > 0
    assert_answers_equal(family, asked, answers)


@pytest.mark.parametrize("case", ["gpt neox", "cohere2", "deepseek v3"])
def test_plain_torch_serves_where_no_kernel_does(tmp_path: Path, case: str) -> None:
    family = save_generic(case, tmp_path)
    asked = prompts((50, 33))
    assert_answers_equal(family, asked, open_engine(tmp_path, kernel_backend="reference").answer(asked, 6))


@pytest.mark.parametrize("case", ["gpt neox", "cohere2"])
def test_the_gpu_kernels_serve_under_the_interpreter(tmp_path: Path, case: str, proves: Callable[..., None]) -> None:
    family = save_generic(case, tmp_path)
    engine = open_engine(tmp_path, kernel_backend="triton")
    asked = prompts((30, 5))
    assert_answers_equal(family, asked, engine.answer(asked, 3))
    ready = engine.client.ready
    proves(architecture=ready.architecture, path="generic", weights="safetensors", backend="triton")


@pytest.mark.parametrize("case", ["gpt neox", "cohere", "qwen2 moe"])
def test_bfloat16_stays_close_to_transformers(tmp_path: Path, case: str) -> None:
    saved = save_generic(case, tmp_path, initializer_range=0.05)
    family = Family(saved.oracle.to(torch.bfloat16), tmp_path)
    (prompt,) = prompts([70])
    (answer,) = open_engine(tmp_path, dtype="bfloat16").answer([prompt], 4)
    expected = family.logits([*prompt, *answer.token_ids])[len(prompt) - 1 : -1].softmax(-1)
    for row, found in zip(expected, answer.logprobs, strict=True):
        ids = list(found)
        torch.testing.assert_close(torch.tensor([found[i] for i in ids]).exp(), row[ids], rtol=0.15, atol=2e-3)


def test_sharded_weights_are_read(tmp_path: Path) -> None:
    family = save_generic("gpt neox", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    family.oracle.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    asked = prompts((40, 9))
    assert_answers_equal(family, asked, open_engine(tmp_path).answer(asked, 6))
