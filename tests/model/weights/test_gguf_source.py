"""GGUF weights: encodings against gguf's own dequantiser, names, row order, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from octavo.model.spec import ModelError
from octavo.model.weights.dequantize import dequantize_rows
from octavo.model.weights.ggml_types import BLOCK_LAYOUT
from octavo.model.weights.gguf_source import open_gguf
from octavo.model.weights.open import open_weights
from weight_files import HEADS, LAYERS, VOCAB, llama_tensors, write_llama_gguf

ROWS, BLOCKS = 37, 6


def random_rows(encoding: str, seed: int = 0) -> np.ndarray:
    """uint8 [ROWS, bytes]: any bits, but with finite fp16 fields so that equality means something."""
    raw = np.random.default_rng(seed).integers(0, 256, (ROWS, BLOCKS * BLOCK_LAYOUT[encoding][1]), dtype=np.uint8)
    if encoding in ("F32", "F16", "BF16"):
        values = np.random.default_rng(seed).standard_normal((ROWS, 64)).astype(np.float32)
        if encoding == "F16":
            values = values.astype(np.float16)
        return values.view(np.uint8) if encoding != "BF16" else values.view(np.uint16)[:, 1::2].copy().view(np.uint8)
    return raw


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("encoding", sorted(BLOCK_LAYOUT))
def test_fp32_equals_ggufs_dequantiser_bit_for_bit(encoding: str) -> None:
    raw = random_rows(encoding)
    expected = torch.from_numpy(dequantize(raw, GGMLQuantizationType[encoding]).copy())
    found = dequantize_rows(torch.from_numpy(raw.copy()), encoding, torch.float32)
    same = (found.view(torch.int32) == expected.view(torch.int32)) | (found.isnan() & expected.isnan())
    assert found.shape == expected.shape
    assert bool(same.all())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("encoding", ["F32", "BF16", "Q4_1", "Q8_0", "Q4_K", "Q3_K"])
def test_other_types_are_rounded_once(encoding: str, dtype: torch.dtype) -> None:
    raw = torch.from_numpy(random_rows(encoding).copy())
    expected = dequantize_rows(raw, encoding, torch.float32).to(dtype)
    assert torch.equal(dequantize_rows(raw, encoding, dtype).nan_to_num(), expected.nan_to_num())


def test_results_do_not_depend_on_the_chunking() -> None:
    block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType.Q4_1][1]
    raw = np.random.default_rng(1).integers(0, 60, (701, 11 * block_bytes), dtype=np.uint8)
    expected = torch.from_numpy(dequantize(raw, GGMLQuantizationType.Q4_1))
    assert torch.equal(dequantize_rows(torch.from_numpy(raw), "Q4_1", torch.float32), expected)


@pytest.mark.parametrize("quant", [GGMLQuantizationType.F32, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0])
def test_names_and_row_order_are_hugging_faces(tmp_path: Path, quant: GGMLQuantizationType) -> None:
    tensors = llama_tensors()
    source = open_gguf(write_llama_gguf(tmp_path / "m.gguf", tensors, quant))
    names = {
        "model.layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
        "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    for name, gguf_name in names.items():
        weight = source.weight(name)
        expected = tensors[gguf_name]
        if expected.ndim == 2:
            from gguf.quants import quantize

            expected = dequantize(quantize(expected, quant), quant)
        assert weight.shape == expected.shape
        assert torch.equal(weight.dequantize(torch.float32), torch.from_numpy(expected.copy()))
        assert weight.raw().shape[0] == (1 if len(weight.shape) == 1 else weight.shape[0])
    assert len(source.names()) == 2 + 9 * LAYERS


def test_raw_views_the_file_and_dequantising_is_fresh(tmp_path: Path) -> None:
    path = write_llama_gguf(tmp_path / "m.gguf")
    before = path.read_bytes()
    source = open_gguf(path)
    weight = source.weight("model.layers.0.mlp.up_proj.weight")
    assert weight.raw().data_ptr() == weight.raw().data_ptr()
    weight.dequantize(torch.float32).zero_()
    source.close()
    assert weight.dequantize(torch.float32).abs().sum() > 0
    with pytest.raises(ModelError, match="closed"):
        source.weight("model.norm.weight")
    assert path.read_bytes() == before


def test_spec(tmp_path: Path) -> None:
    spec = open_gguf(write_llama_gguf(tmp_path / "m.gguf")).spec
    assert (spec.architecture, spec.vocab_size, spec.num_attention_heads) == ("LlamaForCausalLM", VOCAB, HEADS)
    assert (spec.head_dim, spec.tie_word_embeddings, spec.eos_token_ids, spec.bos_token_id) == (16, True, (2, 3), 1)
    assert (spec.rope.kind, spec.rope.theta, spec.rope.rotary_dim) == ("default", 5000.0, 16)


def test_untied_head_and_rope_factors(tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors["output.weight"] = tensors["token_embd.weight"] * 2
    tensors["rope_freqs.weight"] = np.arange(1, 9, dtype=np.float32)
    source = open_gguf(write_llama_gguf(tmp_path / "m.gguf", tensors))
    assert not source.spec.tie_word_embeddings
    assert source.spec.rope.kind == "factors"
    assert source.spec.rope.factors == tuple(range(1, 9))
    assert "lm_head.weight" in source.names()


def test_linear_rope_scaling(tmp_path: Path) -> None:
    extra: dict[str, object] = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    rope = open_gguf(write_llama_gguf(tmp_path / "m.gguf", extra=extra)).spec.rope
    assert (rope.kind, rope.factor) == ("linear", 4.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "mamba"}, r"'mamba' is not supported \(supported: gemma2, "),
        ({"extra": {"llama.expert_count": 8}}, "expert_used_count"),
        ({"extra": {"llama.rope.scaling.type": "longrope"}}, "longrope"),
        ({"extra": {"llama.attention.key_length": 15}}, "15|contradict|asks for|odd"),
        ({"extra": {"llama.attention.key_length": 32}}, "RoPE covers 16 of 32"),
        ({"drop": "token_embd.weight"}, "token_embd"),
        ({"add": ("blk.0.attn_sub_norm.weight", (64,))}, "attn_sub_norm"),
        ({"add": ("blk.7.attn_norm.weight", (64,))}, "blk.7"),
        ({"add": ("output.weight", (40, 32))}, "asks for"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tensors = llama_tensors()
    tensors.pop(change.get("drop", ""), None)
    if "add" in change:
        tensors[change["add"][0]] = np.zeros(change["add"][1], np.float32)
    path = write_llama_gguf(tmp_path / "m.gguf", tensors, arch=change.get("arch", "llama"), extra=change.get("extra"))
    with pytest.raises(ModelError, match=message) as caught:
        open_gguf(path)
    assert "\n" not in str(caught.value)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    source = open_gguf(write_llama_gguf(tmp_path / "m.gguf"))
    with pytest.raises(ModelError, match=r"lm_head\.weight is missing"):
        source.weight("lm_head.weight")


def test_ends_of_turns_are_found_by_name(tmp_path: Path) -> None:
    """Converters name one of them in the header, and chat templates end with another."""
    names = {3: "<|eot_id|>", 5: "<end_of_turn>", 6: "<|im_start|>", 9: "<|end|>"}
    assert open_gguf(write_llama_gguf(tmp_path / "m.gguf", pieces=names)).spec.eos_token_ids == (2, 3, 5, 9)


def test_yarn_extends_what_the_header_calls_the_context(tmp_path: Path) -> None:
    yarn: dict[str, object] = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 128,
    }
    assert open_gguf(write_llama_gguf(tmp_path / "m.gguf", extra=yarn)).spec.max_position_embeddings == 512


@pytest.mark.real_model
def test_default_model_matches_its_file() -> None:
    from octavo.model.weights.resolve import resolve_model

    source = open_weights(str(resolve_model(None).path))
    assert (source.spec.num_hidden_layers, source.spec.vocab_size, source.spec.eos_token_ids) == (30, 49152, (2, 0))
    for name in ("model.layers.3.mlp.up_proj.weight", "model.layers.29.self_attn.q_proj.weight"):
        weight = source.weight(name)
        expected = torch.from_numpy(dequantize(weight.raw().numpy(), GGMLQuantizationType[weight.encoding]))
        assert torch.equal(weight.dequantize(torch.float32), expected)
