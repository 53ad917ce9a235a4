"""Qwen3 (Yang et al. 2025), dense or with experts: Llama's block with a norm of each head of queries and keys."""

from __future__ import annotations

from ..building import Builder
from ..layers import Attention
from .decoder import Decoder


class Qwen3ForCausalLM(Decoder):
    def attention(self, builder: Builder, prefix: str, layer: int) -> Attention:
        return builder.attention(f"{prefix}.self_attn", layer, head_norms=True)
