"""Safetensors directories: specs as transformers reads them, values, and damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.model.spec import ModelError
from octavo.model.weights.generation import read_generation_defaults
from octavo.model.weights.gguf_source import open_gguf
from octavo.model.weights.open import open_weights, read_spec
from octavo.model.weights.resolve import ModelFiles
from octavo.model.weights.safetensors_file import SafetensorsFile
from octavo.model.weights.safetensors_source import SafetensorsSource, open_safetensors
from weight_files import HEADS, HIDDEN, INNER, KV_HEADS, LAYERS, VOCAB, write_llama_gguf


def save_llama(path: Path, shard_size: str = "5GB", **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    values: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 128,
        "tie_word_embeddings": True, "eos_token_id": [2, 3],
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(values | changes)))
    model.save_pretrained(path, max_shard_size=shard_size)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("llama")
    return path, dict(save_llama(path).state_dict())


def copy_of(saved: tuple[Path, dict[str, torch.Tensor]], target: Path) -> Path:
    for file in saved[0].iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "REMOVE"}))


def test_values_and_spec(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    source = open_weights(str(saved[0]))
    spec = source.spec
    assert (spec.architecture, spec.tie_word_embeddings, spec.eos_token_ids) == ("LlamaForCausalLM", True, (2, 3))
    assert (spec.head_dim, spec.num_key_value_heads, spec.vocab_size) == (HIDDEN // HEADS, KV_HEADS, VOCAB)
    for name in source.names():
        assert torch.equal(source.weight(name).dequantize(torch.float32), saved[1][name])
    source.close()
    with pytest.raises(ModelError, match="closed"):
        source.weight("model.norm.weight")


def test_reading_the_shape_alone_closes_the_files(
    saved: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[SafetensorsSource] = []
    monkeypatch.setattr(SafetensorsSource, "close", lambda source: closed.append(source))
    assert read_spec(str(saved[0])).vocab_size == VOCAB
    assert len(closed) == 1


def test_several_shards_and_an_untied_head(tmp_path: Path) -> None:
    model = save_llama(tmp_path, shard_size="40KB", tie_word_embeddings=False)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    source = open_safetensors(tmp_path)
    assert not source.spec.tie_word_embeddings
    assert set(source.names()) == set(model.state_dict())
    assert torch.equal(source.weight("lm_head.weight").dequantize(torch.float32), model.state_dict()["lm_head.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import save_file

    model = save_llama(tmp_path)
    weights = {
        name: value.to(dtype).contiguous() for name, value in model.state_dict().items() if "lm_head" not in name
    }
    save_file(weights, tmp_path / "model.safetensors")
    weight = open_safetensors(tmp_path).weight("model.layers.0.mlp.up_proj.weight")
    assert weight.encoding == {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert torch.equal(weight.dequantize(dtype), weights["model.layers.0.mlp.up_proj.weight"])
    assert weight.dequantize(dtype).data_ptr() != weight.raw().data_ptr()


def test_gguf_and_safetensors_of_one_model_agree(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    renames = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    tensors = {}
    for name, value in saved[1].items():
        if name == "lm_head.weight":
            continue
        renamed = name
        for old, new in renames.items():
            renamed = renamed.replace(old, new)
        tensors[renamed] = value.numpy()
    theirs = open_safetensors(saved[0])
    ours = open_gguf(write_llama_gguf(tmp_path / "m.gguf", tensors))
    assert set(ours.names()) == set(theirs.names())
    for name in ours.names():
        left, right = ours.weight(name), theirs.weight(name)
        assert torch.equal(left.dequantize(torch.float32), right.dequantize(torch.float32)), name
        assert torch.equal(left.raw(), right.raw()), name


V5_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
V4_LLAMA3 = {("type" if key == "rope_type" else key): value for key, value in V5_LLAMA3.items() if key != "rope_theta"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, ("default", 1e6, 1.0)),
        ({"rope_parameters": "REMOVE", "rope_theta": 2e6}, ("default", 2e6, 1.0)),
        ({"rope_parameters": "REMOVE", "rope_scaling": {"type": "linear", "factor": 2.0}}, ("linear", 1e4, 2.0)),
        ({"rope_parameters": V5_LLAMA3}, ("llama3", 5e5, 8.0)),
        ({"rope_parameters": "REMOVE", "rope_theta": 5e5, "rope_scaling": V4_LLAMA3}, ("llama3", 5e5, 8.0)),
    ],
)
def test_rope_in_both_styles(
    saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, changes: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    edit_config(copy_of(saved, tmp_path), **changes)
    rope = open_safetensors(tmp_path).spec.rope
    assert (rope.kind, rope.theta, rope.factor) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "proportional", "factor": 2.0}},
            "RoPE type 'proportional' is not supported",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": -2.0}}, "factor should be positive"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "long_factor should be a list"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2]}},
            "1 long factors for 8",
        ),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "differs between layers"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised"),
        ({"hidden_act": "relu2"}, "'relu2' is not supported"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": "REMOVE"}, "hidden_size"),
        ({"num_attention_heads": 0}, "positive"),
        ({"architectures": "REMOVE"}, "architectures"),
        ({"vocab_size": 41}, "asks for"),
        ({"tie_word_embeddings": False}, "lm_head"),
        ({"head_dim": 1 << 40}, "head_dim"),
        ({"num_key_value_heads": 3}, "divide"),
    ],
)
def test_bad_config_is_one_clear_line(
    saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    edit_config(copy_of(saved, tmp_path), **changes)
    with pytest.raises(ModelError, match=message) as caught:
        open_safetensors(tmp_path)
    assert "\n" not in str(caught.value)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_of(header: Any, data: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        (1 << 62).to_bytes(8, "little") + b"{}",
        file_of(b"{"),
        file_of(b"[]"),
        file_of(b"[" * 200_000),
        file_of(b'{"a":1,"a":2}'),
        file_of(b"\xff\xfe"),
        file_of(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}'),
        file_of({"w": 3}),
        file_of({"w": entry(dtype="F33")}),
        file_of({"w": entry(shape=[-1])}),
        file_of({"w": entry(shape=[True])}),
        file_of({"w": entry(shape=[1.0])}),
        file_of({"w": entry(offsets=[8, 0])}),
        file_of({"w": entry(offsets=[0, 80])}),
        file_of({"w": entry(offsets=[0, 4])}),
        file_of({"w": entry(shape=[1 << 40, 1 << 40])}),
        file_of({"w": entry(), "v": entry(offsets=[4, 12])}),
        file_of({"w": {}}),
    ],
)
def test_damaged_safetensors_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        SafetensorsFile(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/x.safetensors", "x.bin", 3])
def test_index_cannot_leave_its_directory(
    saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, name: object
) -> None:
    copy_of(saved, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ModelError, match="no file of this directory"):
        open_safetensors(tmp_path)


def test_generation_defaults(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    files = ModelFiles(copy_of(saved, tmp_path), "hf", "x")
    stated = {"temperature": 0.6, "top_p": 2.0, "top_k": 20, "repetition_penalty": "x", "eos_token_id": 5}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    assert read_generation_defaults(files) == {"temperature": 0.6, "top_k": 20.0}
    assert open_safetensors(tmp_path).spec.eos_token_ids == (5, 2, 3)
    (tmp_path / "generation_config.json").unlink()
    assert read_generation_defaults(files) == {}
    gguf = write_llama_gguf(tmp_path / "m.gguf", extra={"general.sampling.temp": 0.5})
    assert read_generation_defaults(ModelFiles(gguf, "gguf", "x")) == {"temperature": 0.5}
