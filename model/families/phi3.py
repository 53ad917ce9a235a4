"""Phi-3 and Phi-4-mini (Abdin et al. 2024): Llama's block; q, k and v are one tensor, gate and up another."""

from __future__ import annotations

from ..building import Builder
from ..layers import Attention
from .decoder import MLP, Decoder


class Phi3ForCausalLM(Decoder):
    def attention(self, builder: Builder, prefix: str, layer: int) -> Attention:
        return builder.attention(f"{prefix}.self_attn", layer, fused=True)

    def mlp(self, builder: Builder, prefix: str, layer: int) -> MLP:
        return builder.mlp(f"{prefix}.mlp", fused=True)
