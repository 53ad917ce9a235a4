"""Gemma 2 and 3, text only (Gemma Team 2024, 2025): norms before and after attention and MLP, their weights kept as the
difference from 1; layers with a window and layers without.

Gemma 2 caps scores and logits; Gemma 3 norms each head of queries and keys instead, and rotates layers with a window
otherwise than the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..building import Builder
from ..layers import Attention, Norm
from .decoder import MLP, Block, Decoder, Place


@dataclass(frozen=True, slots=True)
class SandwichBlock:
    """See `decoder.Block`."""

    input_norm: Norm
    attention: Attention
    attention_norm: Norm
    pre_mlp_norm: Norm
    mlp: MLP
    mlp_norm: Norm

    def __call__(
        self, x: torch.Tensor | None, residual: torch.Tensor, place: Place
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self.input_norm.add(x, residual)
        x = self.attention_norm(self.attention(x, place.rope_table, place.kv_layer, place.plan))
        x, residual = self.pre_mlp_norm.add(x, residual)
        return self.mlp_norm(self.mlp(x)), residual


class Gemma2ForCausalLM(Decoder):
    norm_offset = 1.0

    def block(self, builder: Builder, prefix: str, layer: int) -> Block:
        return SandwichBlock(
            input_norm=builder.norm(f"{prefix}.input_layernorm"),
            attention=self.attention(builder, prefix, layer),
            attention_norm=builder.norm(f"{prefix}.post_attention_layernorm"),
            pre_mlp_norm=builder.norm(f"{prefix}.pre_feedforward_layernorm"),
            mlp=self.mlp(builder, prefix, layer),
            mlp_norm=builder.norm(f"{prefix}.post_feedforward_layernorm"),
        )


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    def attention(self, builder: Builder, prefix: str, layer: int) -> Attention:
        return builder.attention(f"{prefix}.self_attn", layer, head_norms=True)
