"""Families of our own, forced through transformers' code, give the same answers as through ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from family_models import Family, assert_answers_equal, open_engine, prompts, save_family
from octavo.model.spec import ModelError
from octavo.model.weights.dummy import open_dummy
from octavo.model.weights.open import open_weights
from quantized_packers import GROUP, Pack, awq, float8, llama_config, write_llama
from transformers import LlamaForCausalLM

NATIVE = ("gemma2", "gemma3", "granite", "mistral", "mixtral", "olmo2", "qwen2 with windows", "qwen3 moe")


@pytest.mark.parametrize("case", NATIVE)
def test_the_generic_path_and_the_family_agree(tmp_path: Path, case: str) -> None:
    family = save_family(case, tmp_path)
    engine = open_engine(tmp_path, model_impl="generic")
    assert any(note.startswith("the generic path serves: on request") for note in engine.client.ready.notes)
    asked = prompts((3, 90, 31))
    generic = engine.answer(asked, 8)
    assert_answers_equal(family, asked, generic)
    native = open_engine(tmp_path, model_impl="native", kernel_backend="reference").answer(asked, 8)
    assert [answer.token_ids for answer in native] == [answer.token_ids for answer in generic]


@pytest.mark.parametrize("case", NATIVE)
def test_both_see_the_same_shape(tmp_path: Path, case: str) -> None:
    save_family(case, tmp_path)
    generic, native = (open_weights(str(tmp_path), model_impl=impl).spec for impl in ("generic", "native"))
    for field in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "max_position_embeddings", "tie_word_embeddings", "eos_token_ids", "bos_token_id", "windows",
        "attention_soft_cap",
    ):  # fmt: skip
        assert getattr(generic, field) == getattr(native, field), field
    assert generic.attention_scale == pytest.approx(native.attention_scale or native.head_dim**-0.5)


@pytest.mark.parametrize(
    ("pack", "config"),
    [
        (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
        (float8("tensor"), {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    ],
    ids=["awq", "fp8"],
)
def test_quantised_safetensors_are_dequantised(tmp_path: Path, pack: Pack, config: dict[str, Any]) -> None:
    checkpoint = write_llama(tmp_path, pack, config)
    oracle = LlamaForCausalLM(llama_config()).eval()
    oracle.load_state_dict(checkpoint.state)
    engine = open_engine(tmp_path, model_impl="generic")
    assert engine.client.ready.weight_bytes == 4 * checkpoint.num_parameters
    asked = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8]]
    assert_answers_equal(Family(oracle, tmp_path), asked, engine.answer(asked, 4))


def test_random_weights_suffice_to_measure(tmp_path: Path) -> None:
    save_family("granite", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    engine = open_engine(tmp_path, model_impl="generic", load_format="dummy")
    (answer,) = engine.answer(prompts((40,)), 5)
    assert len(answer.token_ids) == 5
    native, generic = (open_dummy(tmp_path, impl) for impl in ("native", "generic"))
    assert set(native.names()) == set(generic.names())


def test_a_gguf_file_stays_with_its_family(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"m.gguf: the generic path reads safetensors only; leave model-impl out"):
        open_weights(str(path), model_impl="generic")
