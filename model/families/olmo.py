"""OLMo 2 (Walsh et al. 2025) and OLMoE (Muennighoff et al. 2024): all heads of queries, and all of keys, share a norm.

OLMoE's block is Llama's with experts. OLMo 2 norms what attention and MLP give, and not what they are given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.backend import KernelBackend
from ..building import Builder
from ..layers import Attention, Norm
from .decoder import MLP, Block, Decoder, Place


class OlmoeForCausalLM(Decoder):
    def attention(self, builder: Builder, prefix: str, layer: int) -> Attention:
        return builder.attention(f"{prefix}.self_attn", layer, whole_norms=True)


@dataclass(frozen=True, slots=True)
class PostNormBlock:
    """See `decoder.Block`. Here no norm follows an addition, so none is fused."""

    backend: KernelBackend
    attention: Attention
    attention_norm: Norm
    mlp: MLP
    mlp_norm: Norm

    def __call__(
        self, x: torch.Tensor | None, residual: torch.Tensor, place: Place
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if x is not None:
            residual = self.backend.add(x, residual)
        x = self.attention_norm(self.attention(residual, place.rope_table, place.kv_layer, place.plan))
        residual = self.backend.add(x, residual)
        return self.mlp_norm(self.mlp(residual)), residual


class Olmo2ForCausalLM(OlmoeForCausalLM):
    def block(self, builder: Builder, prefix: str, layer: int) -> Block:
        return PostNormBlock(
            backend=builder.backend,
            attention=self.attention(builder, prefix, layer),
            attention_norm=builder.norm(f"{prefix}.post_attention_layernorm"),
            mlp=self.mlp(builder, prefix, layer),
            mlp_norm=builder.norm(f"{prefix}.post_feedforward_layernorm"),
        )
