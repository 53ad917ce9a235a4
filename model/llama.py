"""Llama (Touvron et al. 2023) and everything of its shape: SmolLM2, TinyLlama, Llama 2 and 3."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..kernels.backend import KernelBackend
from .layer_groups import layer_groups
from .layers import (
    Embedding,
    Linear,
    Norm,
    attention_parameters,
    load_attention,
    load_mlp,
    mlp_parameters,
)
from .rope import rope_table
from .spec import ModelSpec
from .weights.source import WeightSource

_EMBEDDING = "model.embed_tokens.weight"
_FINAL_NORM = "model.norm.weight"
_HEAD = "lm_head.weight"


class LlamaLayer:
    """One pre-norm block; the residual stream travels beside the normalised input."""

    def __init__(self, backend: KernelBackend, source: WeightSource, spec: ModelSpec, index: int) -> None:
        prefix, eps = f"model.layers.{index}", spec.rms_norm_eps
        self.input_norm = Norm(backend, source.weight(f"{prefix}.input_layernorm.weight"), eps)
        self.attention = load_attention(backend, source, spec, f"{prefix}.self_attn", spec.window(index))
        self.mlp_norm = Norm(backend, source.weight(f"{prefix}.post_attention_layernorm.weight"), eps)
        self.mlp = load_mlp(backend, source, spec, f"{prefix}.mlp")


class LlamaForCausalLM:
    """Implements `registry.CausalLM`."""

    def __init__(
        self, spec: ModelSpec, source: WeightSource, backend: KernelBackend, progress: Callable[[float], None]
    ) -> None:
        """Loads everything; the source was checked against `parameters`. `progress` gets the share done, 0 to 1."""
        self._backend = backend
        self.layer_groups = layer_groups(spec)
        self._group_of = {layer: index for index, group in enumerate(self.layer_groups) for layer in group.layer_ids}
        self._embedding = Embedding(backend, source.weight(_EMBEDDING))
        self._layers: list[LlamaLayer] = []
        for index in range(spec.num_hidden_layers):
            self._layers.append(LlamaLayer(backend, source, spec, index))
            progress((index + 1) / (spec.num_hidden_layers + 1))
        self._norm = Norm(backend, source.weight(_FINAL_NORM), spec.rms_norm_eps)
        self._head = None if spec.tie_word_embeddings else Linear(backend, [source.weight(_HEAD)])
        self._spec = spec
        self._rope_table: torch.Tensor | None = None  # fp32 [max_positions, rotary_dim]
        progress(1.0)

    @staticmethod
    def parameters(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield _EMBEDDING, (spec.vocab_size, spec.hidden_size)
        for index in range(spec.num_hidden_layers):
            prefix = f"model.layers.{index}"
            yield f"{prefix}.input_layernorm.weight", (spec.hidden_size,)
            yield from attention_parameters(spec, f"{prefix}.self_attn")
            yield f"{prefix}.post_attention_layernorm.weight", (spec.hidden_size,)
            yield from mlp_parameters(spec, f"{prefix}.mlp")
        yield _FINAL_NORM, (spec.hidden_size,)
        if not spec.tie_word_embeddings:
            yield _HEAD, (spec.vocab_size, spec.hidden_size)

    def prepare(self, max_positions: int) -> None:
        self._rope_table = self._make_rope_table(max_positions)

    def _make_rope_table(self, max_positions: int) -> torch.Tensor:
        return rope_table(self._spec.rope, max_positions, self._backend.device)

    def forward(self, token_ids: torch.Tensor, plans: Sequence[Any], kv_layers: Sequence[torch.Tensor]) -> torch.Tensor:
        if self._rope_table is None:
            self._rope_table = self._make_rope_table(self._spec.max_position_embeddings)
        residual = self._embedding(token_ids)  # [num_tokens, hidden]
        x = self._layers[0].input_norm(residual)
        for index, layer in enumerate(self._layers):
            if index > 0:
                x, residual = layer.input_norm.add(x, residual)
            x = layer.attention(x, self._rope_table, kv_layers[index], plans[self._group_of[index]])
            x, residual = layer.mlp_norm.add(x, residual)
            x = layer.mlp(x)
        return self._backend.add(x, residual)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self._norm(hidden)
        return (self._head or self._embedding).logits(hidden)
