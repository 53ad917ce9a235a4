"""What GGUF calls the parts of each model family, and what it did to them. A new family is one more entry."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_DECODER_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

_LLAMA_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_output.bias": "self_attn.o_proj.bias",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate.bias": "mlp.gate_proj.bias",
    "ffn_up.bias": "mlp.up_proj.bias",
    "ffn_down.bias": "mlp.down_proj.bias",
}


@dataclass(frozen=True, slots=True)
class GgufFamily:
    architecture: str
    """transformers' class name."""
    top: dict[str, str] = field(default_factory=lambda: dict(_DECODER_TOP))
    block: dict[str, str] = field(default_factory=lambda: dict(_LLAMA_BLOCK))
    """Names after `blk.N.` → names after `model.layers.N.`."""
    interleaved_query: tuple[str, ...] = ()
    """Names after `blk.N.` whose rows llama.cpp permuted, one head at a time, over the query heads."""
    interleaved_key: tuple[str, ...] = ()
    """The same over the key heads."""
    ignored: tuple[str, ...] = ("rope_freqs.weight",)
    """Tensors that are no parameters: read with the header, or constants that other programs precompute."""
    refused_keys: tuple[str, ...] = ("expert_count",)
    """Metadata keys after `<arch>.` that, where present and not 0, mean mathematics this family's model lacks."""

    def canonical_name(self, name: str) -> str | None:
        """Hugging Face's name of a GGUF tensor; None where the family has no such tensor."""
        if name in self.top:
            return self.top[name]
        match = re.fullmatch(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)", name)
        if match is None or match[2] not in self.block:
            return None
        return f"model.layers.{match[1]}.{self.block[match[2]]}"


GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily(
        architecture="LlamaForCausalLM",
        interleaved_query=("attn_q.weight", "attn_q.bias"),
        interleaved_key=("attn_k.weight", "attn_k.bias"),
    ),
}
"""By `general.architecture`. llama.cpp files Mistral's dense models under "llama" too; they compute the same."""
