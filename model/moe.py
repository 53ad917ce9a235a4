"""Layers with experts: a router chooses a few of many small MLPs for each token (Shazeer et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.backend import KernelBackend, MoeSpec
from .building import Builder
from .layers import Linear
from .spec import ExpertsSpec


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What a family calls the parts. `module` is what stands in place of a dense layer's `mlp`."""

    module: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class MixtureOfExperts:
    """In place of a `GatedMLP`."""

    def __init__(self, backend: KernelBackend, router: Linear, packed: object, spec: MoeSpec) -> None:
        self._backend = backend
        self._router = router
        self._packed = packed
        self._spec = spec

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden] → [num_tokens, hidden]."""
        return self._backend.moe(x, self._router(x), self._packed, self._spec)


def load_experts(builder: Builder, layer: str, experts: ExpertsSpec, names: ExpertNames) -> MixtureOfExperts:
    """`layer`: e.g. model.layers.0."""
    hidden, inner = builder.spec.hidden_size, experts.intermediate_size
    prefix = f"{layer}.{names.module}"
    router = builder.linear(f"{prefix}.gate", experts.num_experts, hidden)
    gate_up = [
        [builder.weight(f"{prefix}.experts.{expert}.{name}.weight", (inner, hidden)) for name in (names.gate, names.up)]
        for expert in range(experts.num_experts)
    ]
    down = [
        builder.weight(f"{prefix}.experts.{expert}.{names.down}.weight", (hidden, inner))
        for expert in range(experts.num_experts)
    ]
    spec = MoeSpec(
        num_experts=experts.num_experts,
        num_experts_per_token=experts.num_experts_per_token,
        renormalize=experts.renormalize,
        activation=builder.spec.activation,
    )
    return MixtureOfExperts(builder.backend, router, builder.backend.pack_experts(gate_up, down), spec)
