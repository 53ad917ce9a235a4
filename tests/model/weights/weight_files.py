"""Checkpoint files for the tests of model/weights, written to temporary directories."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, VOCAB = 64, 96, 4, 2, 2, 40


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: [head, half, pair] → [head, pair, half]."""
    shape = (heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape))


def llama_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """A tiny llama under GGUF's names, q and k still in Hugging Face's order."""
    random = np.random.default_rng(seed)
    head_dim = HIDDEN // HEADS
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HEADS * head_dim, HIDDEN),
            f"blk.{layer}.attn_k.weight": (KV_HEADS * head_dim, HIDDEN),
            f"blk.{layer}.attn_v.weight": (KV_HEADS * head_dim, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HEADS * head_dim),
            f"blk.{layer}.ffn_gate.weight": (INNER, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (INNER, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, INNER),
        }
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_llama_gguf(
    path: Path,
    tensors: dict[str, np.ndarray] | None = None,
    quant: GGMLQuantizationType = GGMLQuantizationType.F32,
    arch: str = "llama",
    extra: dict[str, object] | None = None,
    pieces: dict[int, str] | None = None,
) -> Path:
    """A complete tiny llama; matrices in `quant`, vectors in F32, q and k interleaved as llama.cpp has them. `pieces`
    names tokens of the vocabulary."""
    writer = GGUFWriter(str(path), arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    writer.add_bos_token_id(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([(pieces or {}).get(index, f"t{index}") for index in range(VOCAB)])
    for key, value in (extra or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)  # type: ignore[arg-type]
    for name, values in (tensors or llama_tensors()).items():
        if ".attn_q." in name:
            values = interleave(values, HEADS)
        if ".attn_k." in name:
            values = interleave(values, KV_HEADS)
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
