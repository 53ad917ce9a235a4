"""Which layers share a pool, block tables and an attention plan."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.backend import AttentionSpec
from .spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers whose attention has the same shape and window."""

    attention: AttentionSpec
    layer_ids: tuple[int, ...]


def attention_spec(spec: ModelSpec, window: int = 0) -> AttentionSpec:
    return AttentionSpec(
        num_heads=spec.num_attention_heads,
        num_kv_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        scale=spec.head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale,
        window=window,
        soft_cap=spec.attention_soft_cap,
    )


def layer_groups(spec: ModelSpec) -> tuple[LayerGroup, ...]:
    """Layers that attend to everything first, then those with a window."""
    members: dict[int, list[int]] = {}
    for layer in range(spec.num_hidden_layers):
        members.setdefault(spec.window(layer), []).append(layer)
    return tuple(LayerGroup(attention_spec(spec, window), tuple(members[window])) for window in sorted(members))
