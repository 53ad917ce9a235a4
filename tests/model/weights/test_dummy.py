"""Random weights from config.json alone: shapes, values, and which names they accept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.model.families.llama import LlamaForCausalLM
from octavo.model.loader import check_weights
from octavo.model.spec import ModelError
from octavo.model.weights.dummy import DummySource, open_dummy
from octavo.model.weights.open import open_weights
from octavo.model.weights.resolve import HUB_PATTERNS, resolve_model
from weight_files import write_llama_gguf

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
}


def write_config(directory: Path, **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    return directory


def matrices(source: DummySource) -> dict[str, torch.Tensor]:
    weights = {name: source.weight(name) for name in source.names()}
    return {name: weight.dequantize(torch.float32) for name, weight in weights.items() if len(weight.shape) == 2}


def test_a_config_is_a_whole_checkpoint(tmp_path: Path) -> None:
    source = open_weights(str(write_config(tmp_path)), "dummy")
    expected = dict(LlamaForCausalLM.parameters(source.spec))
    assert check_weights(source) == sum(torch.Size(shape).numel() for shape in expected.values())
    for name, shape in expected.items():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            values = source.weight(name).dequantize(dtype)
            assert (tuple(values.shape), values.dtype, values.is_contiguous()) == (shape, dtype, True)
    source.close()


def test_values_are_what_layers_expect(tmp_path: Path) -> None:
    source = open_dummy(write_config(tmp_path))
    assert (source.weight("model.norm.weight").dequantize(torch.float32) == 1).all()
    assert (source.weight("model.layers.1.self_attn.q_proj.bias").dequantize(torch.float32) == 0).all()
    for values in matrices(source).values():
        assert values.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(values.mean().item()) < 0.001
    # Rows that repeat would give tokens of equal logits.
    table = source.weight("model.embed_tokens.weight").dequantize(torch.float32)
    assert torch.linalg.matrix_rank(table) == min(table.shape)


def test_a_tensor_depends_on_its_name_and_the_seed_alone(tmp_path: Path) -> None:
    spec = open_dummy(write_config(tmp_path)).spec
    first, other = matrices(DummySource(spec)), matrices(DummySource(spec, seed=1))
    again = DummySource(spec)
    for name in reversed(first):
        assert torch.equal(again.weight(name).dequantize(torch.float32), first[name])
        assert not torch.equal(other[name], first[name])
    same_shape = [values for name, values in first.items() if "gate_proj" in name or "up_proj" in name]
    assert all(not torch.equal(a, b) for i, a in enumerate(same_shape) for b in same_shape[:i])


def test_matrices_longer_than_the_block_repeat_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.model.weights.dummy._BLOCK_VALUES", 521)
    table = open_dummy(write_config(tmp_path)).weight("model.embed_tokens.weight").dequantize(torch.bfloat16)
    assert len(table.unique(dim=0)) == len(table)


def test_raw_bytes_are_the_values(tmp_path: Path) -> None:
    weight = open_dummy(write_config(tmp_path)).weight("lm_head.weight")
    raw = weight.raw()
    assert (weight.encoding, raw.dtype, tuple(raw.shape)) == ("BF16", torch.uint8, (320, 128))
    assert torch.equal(raw.view(torch.bfloat16), weight.dequantize(torch.bfloat16))


@pytest.mark.parametrize("tied", [True, False])
def test_the_config_says_whether_the_head_is_tied(tmp_path: Path, tied: bool) -> None:
    source = open_dummy(write_config(tmp_path, tie_word_embeddings=tied))
    assert ("lm_head.weight" in source.names()) is not tied


def test_weights_beside_the_config_are_not_looked_at(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    write_llama_gguf(tmp_path / "other.gguf")
    assert resolve_model(str(tmp_path), needs_weights=False).kind == "hf"
    open_weights(str(tmp_path), "dummy")
    with pytest.raises(ModelError):
        open_weights(str(tmp_path))


@pytest.mark.parametrize("name", [None, "tiny.gguf", ".", "empty", "org/name:file.gguf"])
def test_what_has_no_config_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_llama_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        resolve_model(name, needs_weights=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"architectures": ["NoSuchModel"]}, {"head_dim": 7}, {"vocab_size": 0}])
def test_a_config_that_makes_no_model_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        open_dummy(write_config(tmp_path, **change))


def test_a_hub_id_fetches_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[str]] = {}

    def fetch(repo: str, **arguments: Any) -> str:
        asked[repo] = arguments["allow_patterns"]
        return str(tmp_path)

    write_config(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert resolve_model("org/name", needs_weights=False).path == tmp_path
    assert asked["org/name"] == [pattern for pattern in HUB_PATTERNS if "safetensors" not in pattern]
    with pytest.raises(ModelError, match=r"no config\.json with safetensors"):
        resolve_model("org/name")
    assert asked["org/name"] == HUB_PATTERNS
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_model("org/name", needs_weights=False)
