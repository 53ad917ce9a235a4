"""The frame of all families: token table, blocks, final norm, head. A family says how its blocks are made.

A block takes what the one before it left to be added, and the residual stream, and gives the same back: so the addition
can be fused with the norm that follows it, which is the next block's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from ...kernels.backend import KernelBackend
from ..building import Builder, Declaration
from ..layer_groups import LayerGroup, layer_groups
from ..layers import Attention, Embedding, Norm
from ..moe import ExpertNames, load_experts
from ..rope import rope_table
from ..spec import ModelSpec, RopeSpec
from ..weights.source import WeightSource


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block finds positions and K/V in this step."""

    rope_table: torch.Tensor  # fp32 [max_positions, rotary_dim]
    kv_layer: torch.Tensor  # [num_blocks, 2, num_kv_heads, block_size, head_dim]
    plan: Any
    """The backend's, of the layer's group."""


class Block(Protocol):
    def __call__(
        self, x: torch.Tensor | None, residual: torch.Tensor, place: Place
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [num_tokens, hidden], and both may be overwritten; x is None before the first block."""
        ...


MLP = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class PreNormBlock:
    """Llama's: a norm before attention and one before the MLP."""

    input_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: MLP

    def __call__(
        self, x: torch.Tensor | None, residual: torch.Tensor, place: Place
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self.input_norm.add(x, residual)
        x = self.attention(x, place.rope_table, place.kv_layer, place.plan)
        x, residual = self.mlp_norm.add(x, residual)
        return self.mlp(x), residual


class Decoder:
    """Implements `registry.CausalLM`; the classes made of it, `registry.ModelFamily`."""

    norm_offset: ClassVar[float] = 0.0
    """What every norm adds to its weight."""
    expert_names: ClassVar[ExpertNames] = ExpertNames()

    def __init__(
        self, spec: ModelSpec, source: WeightSource, backend: KernelBackend, progress: Callable[[float], None]
    ) -> None:
        """Loads everything; the source was checked against `parameters`. `progress` gets the share done, 0 to 1."""
        self._build(Builder(spec, source, backend, norm_offset=self.norm_offset), progress)

    @classmethod
    def parameters(cls, spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
        declaration = Declaration(spec)
        cls.__new__(cls)._build(declaration, lambda share: None)
        return iter(declaration.parameters)

    def block(self, builder: Builder, prefix: str, layer: int) -> Block:
        """The block of a layer; `prefix` is e.g. model.layers.0."""
        return PreNormBlock(
            input_norm=builder.norm(f"{prefix}.input_layernorm"),
            attention=self.attention(builder, prefix, layer),
            mlp_norm=builder.norm(f"{prefix}.post_attention_layernorm"),
            mlp=self.mlp(builder, prefix, layer),
        )

    def attention(self, builder: Builder, prefix: str, layer: int) -> Attention:
        return builder.attention(f"{prefix}.self_attn", layer)

    def mlp(self, builder: Builder, prefix: str, layer: int) -> MLP:
        experts = builder.spec.experts
        if experts is None or layer in experts.dense_layers:
            return builder.mlp(f"{prefix}.mlp")
        return load_experts(builder, prefix, experts, self.expert_names)

    def _build(self, builder: Builder, progress: Callable[[float], None]) -> None:
        spec, backend = builder.spec, builder.backend
        self._spec, self._backend = spec, backend
        self.layer_groups: tuple[LayerGroup, ...] = layer_groups(spec)
        self._group_of = {layer: index for index, group in enumerate(self.layer_groups) for layer in group.layer_ids}
        table_shape = (spec.vocab_size, spec.hidden_size)
        table = builder.weight("model.embed_tokens.weight", table_shape)
        self._embedding = Embedding(backend, table, spec.embedding_scale)
        self._blocks: list[Block] = []
        for layer in range(spec.num_hidden_layers):
            self._blocks.append(self.block(builder, f"model.layers.{layer}", layer))
            progress((layer + 1) / (spec.num_hidden_layers + 1))
        self._norm = builder.norm("model.norm")
        self._head = None if spec.tie_word_embeddings else builder.linear("lm_head", *table_shape)
        self._rope_tables: dict[RopeSpec, torch.Tensor] = {}  # fp32 [max_positions, rotary_dim] each
        progress(1.0)

    def prepare(self, max_positions: int) -> None:
        spec = self._spec
        for rope in {spec.layer_rope(layer) for layer in range(spec.num_hidden_layers)}:
            self._rope_tables[rope] = rope_table(rope, max_positions, self._backend.device)

    def forward(self, token_ids: torch.Tensor, plans: Sequence[Any], kv_layers: Sequence[torch.Tensor]) -> torch.Tensor:
        if not self._rope_tables:
            self.prepare(self._spec.max_position_embeddings)
        x, residual = None, self._embedding(token_ids)  # [num_tokens, hidden]
        for layer, block in enumerate(self._blocks):
            rope = self._rope_tables[self._spec.layer_rope(layer)]
            x, residual = block(x, residual, Place(rope, kv_layers[layer], plans[self._group_of[layer]]))
        assert x is not None  # there is at least one block
        return self._backend.add(x, residual, self._spec.residual_scale)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        head = self._head or self._embedding
        return head.logits(self._norm(hidden), self._spec.logit_scale, self._spec.logit_soft_cap)
