"""What families of decoder-only transformers share. Plain objects: weights in, operators of the backend called.

A layer holds what the backend packed for it and never asks for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..kernels.backend import Activation, AttentionSpec, KernelBackend, QKNorms
from ..kernels.weights import StoredWeight


class Norm:
    """RMSNorm (Zhang and Sennrich 2019), alone or with the residual addition before it."""

    def __init__(
        self, backend: KernelBackend, weight: StoredWeight, eps: float, *, offset: float = 0.0, scale: float = 1.0
    ) -> None:
        """`offset` is added to the weight; `scale` multiplies what is added to the residual stream."""
        self._backend = backend
        self.weight = backend.pack_vector(weight, offset)  # [hidden]
        self.eps = eps
        self._scale = scale

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] → the same shape."""
        return self._backend.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor | None, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(sum), sum) of what the last block left to be added and the residual stream, each [num_tokens, hidden];
        both inputs may be overwritten. x is None before the first block."""
        if x is None:
            return self(residual), residual
        return self._backend.add_rms_norm(x, residual, self.weight, self.eps, self._scale)


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

    def logits(self, hidden: torch.Tensor, scale: float, soft_cap: float) -> torch.Tensor:
        """[n, hidden] → [n, vocab], where the matrix is the head."""
        return self._backend.logits(hidden, self._packed, scale=scale, soft_cap=soft_cap)


class Attention:
    """Grouped-query attention (Ainslie et al. 2023) over the paged pool, with rotary positions."""

    def __init__(
        self,
        backend: KernelBackend,
        spec: AttentionSpec,
        qkv: Linear,
        output: Linear,
        *,
        head_norms: QKNorms | None = None,
        whole_norms: QKNorms | None = None,
    ) -> None:
        """head_norms: of each head of q and k; whole_norms: of all heads of q together, and all of k."""
        self._backend = backend
        self._spec = spec
        self._qkv = qkv
        self._output = output
        self._head_norms = head_norms
        self._whole_norms = whole_norms

    def __call__(self, x: torch.Tensor, rope_table: torch.Tensor, kv_layer: torch.Tensor, plan: Any) -> torch.Tensor:
        """x [num_tokens, hidden], rope_table [max_positions, rotary_dim], kv_layer one layer of the pool."""
        qkv = self._qkv(x)  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
        if self._whole_norms is not None:
            norms = self._whole_norms
            qkv = self._backend.norm_parts(qkv, (norms.q, norms.k), norms.eps)
        q = self._backend.rope_and_write_kv(qkv, rope_table, kv_layer, plan, self._spec, self._head_norms)
        return self._output(self._backend.attention(q, kv_layer, plan, self._spec))


class GatedMLP:
    """SwiGLU and its kin (Shazeer 2020): down(activation(gate(x)) * up(x))."""

    def __init__(self, backend: KernelBackend, gate_up: Linear, down: Linear, activation: Activation) -> None:
        self._backend = backend
        self._gate_up = gate_up
        self._down = down
        self._activation: Activation = activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden] → [num_tokens, hidden]."""
        return self._down(self._backend.gated(self._gate_up(x), self._activation))


class Embedding:
    """The token table, which is also the head where a model ties the two."""

    def __init__(self, backend: KernelBackend, table: StoredWeight, scale: float = 1.0) -> None:
        self._backend = backend
        self._packed = backend.pack_embedding(table)
        self._scale = scale

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [num_tokens] → [num_tokens, hidden]."""
        return self._backend.embed(token_ids, self._packed, self._scale)

    def logits(self, hidden: torch.Tensor, scale: float, soft_cap: float) -> torch.Tensor:
        """[n, hidden] → [n, vocab], without the embedding's scale."""
        return self._backend.logits(hidden, self._packed, scale=scale, soft_cap=soft_cap)
