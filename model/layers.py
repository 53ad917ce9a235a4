"""What families of decoder-only transformers share. Plain objects: weights in, operators of the backend called.

A layer holds what the backend packed for it and never asks for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..kernels.backend import AttentionSpec, KernelBackend
from ..kernels.weights import StoredWeight
from .layer_groups import attention_spec
from .spec import ModelSpec
from .weights.source import WeightSource


class Norm:
    """RMSNorm (Zhang and Sennrich 2019), alone or with the residual addition before it."""

    def __init__(self, backend: KernelBackend, weight: StoredWeight, eps: float) -> None:
        self._backend = backend
        self._weight = backend.pack_vector(weight)  # [hidden]
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] → the same shape."""
        return self._backend.rms_norm(x, self._weight, self._eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual), each [num_tokens, hidden]; both inputs may be overwritten."""
        return self._backend.add_rms_norm(x, residual, self._weight, self._eps)


class Linear:
    """One matrix product, possibly of several merged matrices."""

    def __init__(
        self, backend: KernelBackend, parts: Sequence[StoredWeight], bias: Sequence[StoredWeight] = ()
    ) -> None:
        self._backend = backend
        self._packed = backend.pack_linear(parts, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in] → [num_tokens, sum of outs]."""
        return self._backend.linear(x, self._packed)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] → [n, vocab], where the matrix is the head."""
        return self._backend.logits(hidden, self._packed)


class Attention:
    """Grouped-query attention (Ainslie et al. 2023) over the paged pool, with rotary positions."""

    def __init__(self, backend: KernelBackend, spec: AttentionSpec, qkv: Linear, output: Linear) -> None:
        self._backend = backend
        self._spec = spec
        self._qkv = qkv
        self._output = output

    def __call__(self, x: torch.Tensor, rope_table: torch.Tensor, kv_layer: torch.Tensor, plan: Any) -> torch.Tensor:
        """x [num_tokens, hidden], rope_table [max_positions, rotary_dim], kv_layer one layer of the pool."""
        qkv = self._qkv(x)  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
        q = self._backend.rope_and_write_kv(qkv, rope_table, kv_layer, plan, self._spec)
        return self._output(self._backend.attention(q, kv_layer, plan, self._spec))


class GatedMLP:
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, backend: KernelBackend, gate_up: Linear, down: Linear) -> None:
        self._backend = backend
        self._gate_up = gate_up
        self._down = down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden] → [num_tokens, hidden]."""
        return self._down(self._backend.silu_mul(self._gate_up(x)))


class Embedding:
    """The token table, which is also the head where a model ties the two."""

    def __init__(self, backend: KernelBackend, table: StoredWeight) -> None:
        self._backend = backend
        self._packed = backend.pack_embedding(table)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [num_tokens] → [num_tokens, hidden]."""
        return self._backend.embed(token_ids, self._packed)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] → [n, vocab]."""
        return self._backend.logits(hidden, self._packed)


def attention_parameters(spec: ModelSpec, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a `self_attn` of q, k, v and o projections."""
    q_size, kv_size = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    for name, size in (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)):
        yield f"{prefix}.{name}.weight", (size, spec.hidden_size)
        if spec.attention_bias:
            yield f"{prefix}.{name}.bias", (size,)
    yield f"{prefix}.o_proj.weight", (spec.hidden_size, q_size)
    if spec.attention_bias:
        yield f"{prefix}.o_proj.bias", (spec.hidden_size,)


def mlp_parameters(spec: ModelSpec, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of an `mlp` of gate, up and down projections."""
    wide, narrow = spec.intermediate_size, spec.hidden_size
    for name, shape in (("gate_proj", (wide, narrow)), ("up_proj", (wide, narrow)), ("down_proj", (narrow, wide))):
        yield f"{prefix}.{name}.weight", shape
        if spec.mlp_bias:
            yield f"{prefix}.{name}.bias", shape[:1]


def load_linear(
    backend: KernelBackend, source: WeightSource, prefix: str, names: Sequence[str], *, bias: bool
) -> Linear:
    """The projections `names` under `prefix`, merged in this order."""
    weights = [source.weight(f"{prefix}.{name}.weight") for name in names]
    biases = [source.weight(f"{prefix}.{name}.bias") for name in names] if bias else []
    return Linear(backend, weights, biases)


def load_attention(
    backend: KernelBackend, source: WeightSource, spec: ModelSpec, prefix: str, window: int = 0
) -> Attention:
    return Attention(
        backend,
        attention_spec(spec, window),
        qkv=load_linear(backend, source, prefix, ("q_proj", "k_proj", "v_proj"), bias=spec.attention_bias),
        output=load_linear(backend, source, prefix, ("o_proj",), bias=spec.attention_bias),
    )


def load_mlp(backend: KernelBackend, source: WeightSource, spec: ModelSpec, prefix: str) -> GatedMLP:
    return GatedMLP(
        backend,
        gate_up=load_linear(backend, source, prefix, ("gate_proj", "up_proj"), bias=spec.mlp_bias),
        down=load_linear(backend, source, prefix, ("down_proj",), bias=spec.mlp_bias),
    )
