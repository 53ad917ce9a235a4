"""Our paged attention as an attention implementation of transformers.

transformers' modelling code looks its attention function up by name (`AttentionInterface`), and hands it the module
that asks along with q, k and v, positions already applied. Each attention module of a served model carries a
`PagedAttention` that knows its layer; the step's plans and pools are in one `Step` that all of them share. So nothing
is global but the name. No mask is registered under it: transformers then builds none, and windows are the plans'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from ...kernels.backend import AttentionSpec, KernelBackend

NAME = "octavo_paged"
ATTRIBUTE = "octavo_attention"
"""Of an attention module: its `PagedAttention`."""


@dataclass(slots=True)
class Step:
    """What the attention layers of one step read. Filled before the modelling code runs, emptied after."""

    plans: Sequence[Any] = ()
    kv_layers: Sequence[torch.Tensor] = ()
    no_rotation: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """fp32 [max_positions, 2], a cosine of 1 and a sine of 0 each: modelling code has rotated q and k already."""


class PagedAttention:
    """One layer's attention over the pool: writes the step's K/V to their slots, then attends over block tables."""

    def __init__(self, backend: KernelBackend, spec: AttentionSpec, layer: int, group: int, step: Step) -> None:
        """`group`: the layer's among those with a plan of their own."""
        self._backend = backend
        self._spec = spec
        self._layer = layer
        self._group = group
        self._step = step

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [1, num_heads, num_tokens, head_dim], key and value [1, num_kv_heads, num_tokens, …], all tokens of the
        step in a row → [1, num_tokens, num_heads, value_dim].

        Values narrower than keys (multi-head latent attention) are kept with zeros behind them.
        """
        spec, step, value_dim = self._spec, self._step, value.shape[-1]
        if value_dim < spec.head_dim:
            value = F.pad(value, (0, spec.head_dim - value_dim))
        # [num_tokens, num_heads + 2 * num_kv_heads, head_dim]
        heads = torch.cat((query[0], key[0], value[0])).transpose(0, 1)
        num_tokens = heads.shape[0]
        qkv = heads.reshape(num_tokens, -1).to(self._backend.dtype)
        kv_layer, plan = step.kv_layers[self._layer], step.plans[self._group]
        q = self._backend.rope_and_write_kv(qkv, step.no_rotation, kv_layer, plan, spec)
        out = self._backend.attention(q, kv_layer, plan, spec).view(1, num_tokens, spec.num_heads, spec.head_dim)
        return out[..., :value_dim].to(query.dtype)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """`settings` are the layer's scale, window and the like: `probe` has read them, and they are the same each time."""
    if attention_mask is not None:
        raise RuntimeError(f"{type(module).__name__} brings a mask of its own, which paged attention cannot follow")
    return getattr(module, ATTRIBUTE)(query, key, value), None


AttentionInterface.register(NAME, _attend)
