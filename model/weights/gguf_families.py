"""What GGUF calls the parts of each model family, and what it did to them. A new family is one more entry.

Names and changes are those of llama.cpp's converter (convert_hf_to_gguf.py) and its `gguf` package.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_DECODER_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

_ATTENTION = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.bias": "self_attn.o_proj.bias",
}
_QK_NORMS = {
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
}
_MLP = {
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate.bias": "mlp.gate_proj.bias",
    "ffn_up.bias": "mlp.up_proj.bias",
    "ffn_down.bias": "mlp.down_proj.bias",
}
_PRE_NORMS = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_POST_NORMS = {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}
_SANDWICH_NORMS = {
    **_POST_NORMS,
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
}
_LLAMA_BLOCK = {**_PRE_NORMS, **_ATTENTION, **_MLP}
_MOE_BLOCK = {**_PRE_NORMS, **_ATTENTION, **_QK_NORMS, "ffn_gate_inp.weight": "mlp.gate.weight"}
_MOE_EXPERTS = {
    "ffn_gate_exps.weight": "mlp.experts.{}.gate_proj.weight",
    "ffn_up_exps.weight": "mlp.experts.{}.up_proj.weight",
    "ffn_down_exps.weight": "mlp.experts.{}.down_proj.weight",
}
_MIXTRAL_EXPERTS = {
    "ffn_gate_exps.weight": "block_sparse_moe.experts.{}.w1.weight",
    "ffn_up_exps.weight": "block_sparse_moe.experts.{}.w3.weight",
    "ffn_down_exps.weight": "block_sparse_moe.experts.{}.w2.weight",
}
_NO_EXPERTS = ("expert_count",)


@dataclass(frozen=True, slots=True)
class GgufFamily:
    architecture: str
    """transformers' class name."""
    top: dict[str, str] = field(default_factory=lambda: dict(_DECODER_TOP))
    block: dict[str, str] = field(default_factory=lambda: dict(_LLAMA_BLOCK))
    """Names after `blk.N.` → names after `model.layers.N.`."""
    experts: dict[str, str] = field(default_factory=dict)
    """The same of tensors that hold a matrix of every expert, one behind the other; {}: the expert's number."""
    interleaved_query: tuple[str, ...] = ()
    """Names after `blk.N.` whose rows llama.cpp permuted, one head at a time, over the query heads."""
    interleaved_key: tuple[str, ...] = ()
    """The same over the key heads."""
    norm_offset: float = 0.0
    """What the converter added to the weights of all norms."""
    ignored: tuple[str, ...] = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
    """Tensors that are no parameters: read with the header, or constants that other programs precompute."""
    refused_keys: tuple[str, ...] = _NO_EXPERTS
    """Metadata keys after `<arch>.` that, where present and not 0, mean mathematics this family's model lacks."""

    def canonical_name(self, name: str) -> str | None:
        """Hugging Face's name of a GGUF tensor, with a {} for the expert's number where it holds all experts'; None
        where the family has no such tensor."""
        if name in self.top:
            return self.top[name]
        match = re.fullmatch(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)", name)
        if match is None:
            return None
        inner = self.block.get(match[2]) or self.experts.get(match[2])
        return None if inner is None else f"model.layers.{match[1]}.{inner}"


_LLAMA = GgufFamily(
    architecture="LlamaForCausalLM",
    interleaved_query=("attn_q.weight", "attn_q.bias"),
    interleaved_key=("attn_k.weight", "attn_k.bias"),
)
MIXTRAL = GgufFamily(
    architecture="MixtralForCausalLM",
    block={**_PRE_NORMS, **_ATTENTION, "ffn_gate_inp.weight": "block_sparse_moe.gate.weight"},
    experts=_MIXTRAL_EXPERTS,
    interleaved_query=_LLAMA.interleaved_query,
    interleaved_key=_LLAMA.interleaved_key,
    refused_keys=(),
)
"""llama.cpp calls it "llama" too; it is the one with experts."""

GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": _LLAMA,
    "gemma2": GgufFamily("Gemma2ForCausalLM", block={**_SANDWICH_NORMS, **_ATTENTION, **_MLP}, norm_offset=1.0),
    "gemma3": GgufFamily(
        "Gemma3ForCausalLM", block={**_SANDWICH_NORMS, **_ATTENTION, **_QK_NORMS, **_MLP}, norm_offset=1.0
    ),
    "granite": GgufFamily(
        "GraniteForCausalLM",
        interleaved_query=_LLAMA.interleaved_query,
        interleaved_key=_LLAMA.interleaved_key,
    ),
    "olmo2": GgufFamily(
        "Olmo2ForCausalLM",
        block={**_POST_NORMS, **_ATTENTION, **_QK_NORMS, **_MLP},
        refused_keys=(*_NO_EXPERTS, "attention.sliding_window"),  # OLMo 3 has one, and another RoPE beside it
    ),
    "olmoe": GgufFamily("OlmoeForCausalLM", block=_MOE_BLOCK, experts=_MOE_EXPERTS, refused_keys=()),
    "phi3": GgufFamily(
        "Phi3ForCausalLM",
        block={
            **_PRE_NORMS,
            "attn_qkv.weight": "self_attn.qkv_proj.weight",
            "attn_output.weight": "self_attn.o_proj.weight",
            "ffn_up.weight": "mlp.gate_up_proj.weight",
            "ffn_down.weight": "mlp.down_proj.weight",
        },
    ),
    "qwen2": GgufFamily("Qwen2ForCausalLM"),
    "qwen3": GgufFamily("Qwen3ForCausalLM", block={**_LLAMA_BLOCK, **_QK_NORMS}),
    "qwen3moe": GgufFamily("Qwen3MoeForCausalLM", block=_MOE_BLOCK, experts=_MOE_EXPERTS, refused_keys=()),
}
"""By `general.architecture`. llama.cpp files Mistral's dense models under "llama" too; they compute the same."""
