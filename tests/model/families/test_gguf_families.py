"""The same weights from a GGUF file, as llama.cpp's converter would write it, give the same answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import CASES, Family, assert_answers_equal, open_engine, prompts, save_family
from gguf import GGMLQuantizationType, GGUFWriter
from gguf_export import export_gguf
from octavo.kernels.cpu.library import supported_isas
from octavo.model.loader import stored_weights
from octavo.model.spec import ModelError, ModelSpec
from octavo.model.weights.gguf_source import open_gguf
from octavo.model.weights.safetensors_source import open_safetensors

no_native = pytest.mark.skipif(not supported_isas(), reason="the native library was not built")
# llama.cpp keeps no window of a "llama", no layer types of a qwen2, and has experts in every layer of a qwen3moe.
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "qwen3 moe": {"mlp_only_layers": []},
}
NOT_STATED = {
    "mistral": ("bos_token_id", "architecture"),
    "gemma2": ("bos_token_id", "attention_scale"),  # built into llama.cpp, which has no key for it
    "gemma3": ("bos_token_id", "attention_scale"),
}
GGUF_CASES = [case for case in CASES if case not in ("qwen2 with windows", "mistral without window")]


def flat(spec: ModelSpec) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in dataclasses.asdict(spec).items():
        values |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return values


@pytest.mark.parametrize("case", GGUF_CASES)
def test_a_gguf_file_and_the_safetensors_it_was_made_of_agree(tmp_path: Path, case: str) -> None:
    family = save_family(case, tmp_path / "hf", **CHANGES.get(case, {}))
    ours = open_gguf(export_gguf(family.oracle, tmp_path / "m.gguf"))
    theirs = open_safetensors(tmp_path / "hf")
    assert set(ours.names()) == set(theirs.names()) - ({"lm_head.weight"} if ours.spec.tie_word_embeddings else set())
    for name in ours.names():
        torch.testing.assert_close(
            ours.weight(name).dequantize(torch.float32), theirs.weight(name).dequantize(torch.float32),
            rtol=0, atol=2e-7, msg=name,
        )  # fmt: skip
    left, right = flat(ours.spec), flat(theirs.spec)
    for field in NOT_STATED.get(case, ("bos_token_id",)):
        left.pop(field), right.pop(field)
    assert left.keys() == right.keys()
    for field, value in left.items():
        expected = pytest.approx(right[field], rel=1e-6) if isinstance(value, float | tuple) else right[field]
        assert value == expected, field


@pytest.mark.parametrize("case", GGUF_CASES)
def test_answers_from_a_gguf_file_equal_transformers(tmp_path: Path, case: str, proves: Callable[..., None]) -> None:
    changes = dict(CHANGES.get(case, {}))
    if case.startswith("gemma"):
        changes["query_pre_attn_scalar"] = 32  # llama.cpp has the head's size built in
    family = save_family(case, tmp_path / "hf", **changes)
    path = export_gguf(family.oracle, tmp_path / "m.gguf")
    asked = prompts((70, 90, 66))
    engine = open_engine(path)
    assert_answers_equal(family, asked, engine.answer(asked, 8))
    ready = engine.client.ready
    proves(architecture=ready.architecture, path="native", weights="GGUF", backend=ready.backend.split()[0])


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=no_native)])
def test_quantised_experts_are_cut_out_of_their_tensor(
    tmp_path: Path, backend: str, proves: Callable[..., None]
) -> None:
    family = save_family("mixtral", tmp_path / "hf", sliding_window=None, hidden_size=64, intermediate_size=96)
    path = export_gguf(family.oracle, tmp_path / "m.gguf", GGMLQuantizationType.Q8_0)
    source = open_gguf(path)
    state = {name: source.weight(name) for name in source.names()}
    some = state["model.layers.1.block_sparse_moe.experts.4.w2.weight"]
    assert (some.encoding, some.shape, tuple(some.raw().shape)) == ("Q8_0", (64, 96), (64, 96 // 32 * 34))
    assert ("Q8_0", (1, 64, 96)) in stored_weights(source)  # backends are told whose it is
    with torch.no_grad():
        for name, parameter in family.oracle.named_parameters():
            if name.endswith("experts.down_proj"):
                prefix = name.removesuffix("mlp.experts.down_proj") + "block_sparse_moe.experts"
                parts = [state[f"{prefix}.{e}.w2.weight"].dequantize(torch.float32) for e in range(6)]
                parameter.copy_(torch.stack(parts))
            elif name.endswith("experts.gate_up_proj"):
                prefix = name.removesuffix("mlp.experts.gate_up_proj") + "block_sparse_moe.experts"
                parts = [
                    torch.cat([state[f"{prefix}.{e}.{w}.weight"].dequantize(torch.float32) for w in ("w1", "w3")])
                    for e in range(6)
                ]
                parameter.copy_(torch.stack(parts))
            else:
                parameter.copy_(state[name.replace("mlp.gate", "block_sparse_moe.gate")].dequantize(torch.float32))
    asked = prompts((40, 20))
    engine = open_engine(path, kernel_backend=backend)
    assert_answers_equal(Family(family.oracle, path), asked, engine.answer(asked, 8))
    ready = engine.client.ready
    proves(architecture=ready.architecture, path="native", weights="GGUF Q8_0", backend=ready.backend.split()[0])


@pytest.mark.parametrize(
    ("case", "key", "value", "message"),
    [
        ("olmo2", "olmo2.attention.sliding_window", 64, "attention.sliding_window is set, which is not supported"),
        ("qwen3", "qwen3.attention.sliding_window", 64, "does not say which.*cannot be served"),
        ("qwen3", "qwen3.expert_count", 4, "expert_count is set, which is not supported"),
    ],
)
def test_what_a_family_lacks_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, key: str, value: int, message: str
) -> None:
    family = save_family(case, tmp_path / "hf")
    original = GGUFWriter.write_header_to_file

    def with_key(writer: GGUFWriter) -> None:
        writer.add_uint32(key, value)
        original(writer)

    monkeypatch.setattr(GGUFWriter, "write_header_to_file", with_key)
    path = export_gguf(family.oracle, tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=message) as caught:
        open_gguf(path)
    assert "\n" not in str(caught.value)


def test_gemma_2s_window_is_known_where_the_header_is_older_than_the_key(tmp_path: Path) -> None:
    family = save_family("gemma2", tmp_path / "hf")
    family.oracle.config.sliding_window = None
    windows = open_gguf(export_gguf(family.oracle, tmp_path / "m.gguf")).spec.windows
    assert set(windows) == {0, 4096}
    assert windows[:2] == (4096, 0)
