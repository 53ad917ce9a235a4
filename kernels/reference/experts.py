"""Mixture of experts in plain torch: tokens sorted by expert, one product per expert that has any.

    choices     token 0: 5 2    token 1: 2 0    token 2: 5 0        [num_tokens, k]
    sorted      0: tokens 1 2   2: tokens 0 1   5: tokens 0 2       one matrix product for each expert
    summed      by token, in the order of its own choices

A token's sum is over its own experts in the order of their weights, so its neighbours change nothing but the number of
rows of each product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..backend import Activation, MoeSpec
from ..weights import StoredWeight
from .linear import Linear, load_linear


@dataclass(slots=True, frozen=True)
class Experts:
    gate_up: list[Linear]
    """hidden → 2 * inner, gate in the first half. [num_experts]"""
    down: list[Linear]
    """inner → hidden. [num_experts]"""


def load_experts(
    gate_up: Sequence[Sequence[StoredWeight]],
    down: Sequence[StoredWeight],
    device: torch.device,
    dtype: torch.dtype,
    prepack: bool,
) -> Experts:
    return Experts(
        [load_linear(parts, (), device, dtype, prepack) for parts in gate_up],
        [load_linear([part], (), device, dtype, prepack) for part in down],
    )


def moe(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    experts: Experts,
    spec: MoeSpec,
    gated: Callable[[torch.Tensor, Activation], torch.Tensor],
) -> torch.Tensor:
    """See `KernelBackend.moe`."""
    num_tokens, chosen = x.shape[0], spec.num_experts_per_token
    weights, choices = router_logits.softmax(-1, dtype=torch.float32).topk(chosen, dim=-1)  # [num_tokens, k]
    if spec.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    places = choices.view(-1).argsort(stable=True)  # [num_tokens * k], into the flattened choices
    counts = choices.view(-1).bincount(minlength=spec.num_experts).tolist()  # the device is waited for here
    rows = x.index_select(0, places // chosen)  # [num_tokens * k, hidden], by expert
    out = torch.empty_like(rows)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            part = rows[start : start + count]
            inner = gated(experts.gate_up[expert](part), spec.activation)
            out[places[start : start + count]] = experts.down[expert](inner)
            start += count
    # [num_tokens, k, hidden] times [num_tokens, k, 1], summed in fp32.
    return (out.view(num_tokens, chosen, x.shape[1]) * weights.unsqueeze(-1)).sum(1).to(x.dtype)
