"""A model of transformers as the GGUF file that llama.cpp's converter would make of it: its names, its permutation of
queries and keys, its norms of 1 + w, its stacked experts. Written after convert_hf_to_gguf.py, not from our
tables.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf.quants import quantize

Array = npt.NDArray[np.float32]

ARCHITECTURES = {
    "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3", "olmo2": "olmo2", "olmoe": "olmoe",
    "granite": "granite", "llama": "llama",
}  # fmt: skip
PERMUTED = ("llama", "granite")
LEAVES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.qkv_proj": "attn_qkv", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up", "mlp.gate": "ffn_gate_inp",
    "input_layernorm": "attn_norm", "mlp.experts.down_proj": "ffn_down_exps",
}  # fmt: skip


def permute(weight: Array, heads: int) -> Array:
    """[head, half, pair] → [head, pair, half]."""
    shape = (heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape))


def export_gguf(oracle: Any, path: Path, quant: GGMLQuantizationType = GGMLQuantizationType.F32) -> Path:
    config = oracle.config
    arch = ARCHITECTURES[config.model_type]
    writer = GGUFWriter(str(path), arch)
    _write_shape(writer, config)
    _write_specials(writer, config, arch)
    _write_rope(writer, config, arch)
    for name, values in _tensors(oracle, arch):
        if values.ndim == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _write_shape(writer: GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_eos_token_id(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(config.vocab_size)])


def _write_specials(writer: GGUFWriter, config: Any, arch: str) -> None:
    if arch in ("gemma2", "gemma3", "phi3") and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    num_experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if num_experts:
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if arch == "qwen3moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _write_rope(writer: GGUFWriter, config: Any, arch: str) -> None:
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_dimension_count(int(_head_dim(config) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))


def _tensors(oracle: Any, arch: str) -> list[tuple[str, Array]]:
    tensors = []
    for name, tensor in oracle.state_dict().items():
        if name == "lm_head.weight" and oracle.config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if arch in PERMUTED and ".q_proj." in name:
            values = permute(values, oracle.config.num_attention_heads)
        if arch in PERMUTED and ".k_proj." in name:
            values = permute(values, oracle.config.num_key_value_heads)
        if name.endswith("experts.gate_up_proj"):
            layer = name.split(".")[2]
            gate, up = np.split(values, 2, axis=1)
            tensors.append((f"blk.{layer}.ffn_gate_exps.weight", np.ascontiguousarray(gate)))
            tensors.append((f"blk.{layer}.ffn_up_exps.weight", np.ascontiguousarray(up)))
        else:
            tensors.append((_gguf_name(name, arch), values))
    return tensors


def _gguf_name(name: str, arch: str) -> str:
    if name.endswith("experts.down_proj"):
        name += ".weight"
    top = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in top or name == "lm_head.weight":
        return top.get(name, "output.weight")
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    assert match is not None, name
    layer, leaf, kind = match.groups()
    after = arch in ("gemma2", "gemma3", "olmo2")
    norms = {
        "post_attention_layernorm": "post_attention_norm" if after else "ffn_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    return f"blk.{layer}.{norms.get(leaf) or LEAVES[leaf]}.{kind}"
