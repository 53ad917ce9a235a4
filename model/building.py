"""How a family is put together: it names each of its tensors once, with its shape.

The same code builds a model from a checkpoint and lists the tensors that it would read, so the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from ..kernels.backend import KernelBackend, QKNorms
from ..kernels.weights import StoredWeight
from .layer_groups import attention_spec
from .layers import Attention, GatedMLP, Linear, Norm
from .spec import ModelSpec
from .weights.source import WeightSource


class Builder:
    """Makes layers of what a checkpoint holds; its headers were compared with the shapes before."""

    def __init__(
        self, spec: ModelSpec, source: WeightSource, backend: KernelBackend, *, norm_offset: float = 0.0
    ) -> None:
        """`norm_offset`: what every norm of the family adds to its weight."""
        self.spec = spec
        self.backend = backend
        self._source = source
        self._norm_offset = norm_offset

    def weight(self, name: str, shape: tuple[int, ...]) -> StoredWeight:
        return self._source.weight(name)

    def norm(self, name: str, size: int | None = None) -> Norm:
        """`name` without `.weight`; of the hidden size, unless another is given."""
        weight = self.weight(f"{name}.weight", (self.spec.hidden_size if size is None else size,))
        spec = self.spec
        return Norm(self.backend, weight, spec.rms_norm_eps, offset=self._norm_offset, scale=spec.residual_scale)

    def linear(self, name: str, num_outputs: int, num_inputs: int, *, bias: bool = False) -> Linear:
        return self.merged_linear("", [(name, num_outputs)], num_inputs, bias=bias)

    def merged_linear(
        self, prefix: str, outputs: Sequence[tuple[str, int]], num_inputs: int, *, bias: bool = False
    ) -> Linear:
        """Matrices that share their input, as one; `outputs`: name after the prefix, and size, of each in order."""
        weights = [self.weight(f"{prefix}{name}.weight", (size, num_inputs)) for name, size in outputs]
        biases = [self.weight(f"{prefix}{name}.bias", (size,)) for name, size in outputs] if bias else []
        return Linear(self.backend, weights, biases)

    def attention(
        self, prefix: str, layer: int, *, head_norms: bool = False, whole_norms: bool = False, fused: bool = False
    ) -> Attention:
        """`prefix`: of the module. `fused`: q, k and v are one tensor of the file, in this order."""
        spec = self.spec
        q_size, kv_size = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
        parts = [("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)]
        if fused:
            parts = [("qkv_proj", q_size + 2 * kv_size)]
        qkv = self.merged_linear(f"{prefix}.", parts, spec.hidden_size, bias=spec.attention_bias)
        output = self.linear(f"{prefix}.o_proj", spec.hidden_size, q_size, bias=spec.output_bias)
        return Attention(
            self.backend,
            attention_spec(spec, spec.window(layer)),
            qkv,
            output,
            head_norms=self._qk_norms(prefix, spec.head_dim, spec.head_dim) if head_norms else None,
            whole_norms=self._qk_norms(prefix, q_size, kv_size) if whole_norms else None,
        )

    def _qk_norms(self, prefix: str, q_size: int, k_size: int) -> QKNorms:
        q, k = self.norm(f"{prefix}.q_norm", q_size), self.norm(f"{prefix}.k_norm", k_size)
        return QKNorms(q.weight, k.weight, q.eps)

    def mlp(self, prefix: str, *, fused: bool = False) -> GatedMLP:
        """`prefix`: of the module. `fused`: gate and up are one tensor of the file, in this order."""
        wide, narrow, bias = self.spec.intermediate_size, self.spec.hidden_size, self.spec.mlp_bias
        parts = [("gate_up_proj", 2 * wide)] if fused else [("gate_proj", wide), ("up_proj", wide)]
        gate_up = self.merged_linear(f"{prefix}.", parts, narrow, bias=bias)
        down = self.linear(f"{prefix}.down_proj", narrow, wide, bias=bias)
        return GatedMLP(self.backend, gate_up, down, self.spec.activation)


class Declaration(Builder):
    """Notes the tensors that are asked for, and reads none."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, cast(WeightSource, None), cast(KernelBackend, _PacksNothing()))
        self.parameters: list[tuple[str, tuple[int, ...]]] = []

    def weight(self, name: str, shape: tuple[int, ...]) -> StoredWeight:
        self.parameters.append((name, shape))
        return cast(StoredWeight, None)


class _PacksNothing:
    """Stands in for a backend while a family is declared: layers are built, and never run."""

    def pack_linear(self, parts: Sequence[Any], bias: Sequence[Any] = ()) -> None:
        return None

    def pack_embedding(self, table: Any) -> None:
        return None

    def pack_vector(self, weight: Any, offset: float = 0.0) -> torch.Tensor:
        return torch.empty(0)

    def pack_experts(self, gate_up: Sequence[Any], down: Sequence[Any]) -> None:
        return None
