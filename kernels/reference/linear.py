"""Matrix products of the reference backend: weights dequantised to the working dtype once, at load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from ..weights import StoredWeight

_MAX_HEAD_COPY_BYTES = 256 * 2**20
"""A tied table is kept a second time, packed for the head, up to this size; beyond it speed costs too much memory."""


class Linear(Protocol):
    """x [num_tokens, in] → [num_tokens, out]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class DenseLinear:
    """A plain matrix, multiplied by whatever `torch.nn.functional.linear` finds best."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight  # [out, in]
        self._bias = bias  # [out] | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)


class PrepackedLinear:
    """A matrix in oneDNN's blocked layout, as torch's inductor packs it; saves a quarter of the time at few rows."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight: Any = torch.ops.mkldnn._reorder_linear_weight(weight, None)  # opaque, [out, in]
        self._bias = bias  # [out] | None
        self._product: Any = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._product(x, self._weight, self._bias, "none", [], "")
        return product


class EmbeddingTable:
    """A [vocab, hidden] table for look-up, and as a head for models that tie the two."""

    def __init__(self, table: torch.Tensor, prepack: bool) -> None:
        self.table = table  # [vocab, hidden]
        self._prepack = prepack and table.nbytes <= _MAX_HEAD_COPY_BYTES
        self._head: Linear | None = None

    @property
    def head(self) -> Linear:
        """Made at first use, because an untied model never asks for it."""
        if self._head is None:
            self._head = make_linear(self.table, None, self._prepack)
        return self._head


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None, prepack: bool) -> Linear:
    """weight [out, in], bias [out]; `prepack` as `can_prepack` answered."""
    return PrepackedLinear(weight, bias) if prepack else DenseLinear(weight, bias)


def load_linear(
    parts: Sequence[StoredWeight], bias: Sequence[StoredWeight], device: torch.device, dtype: torch.dtype, prepack: bool
) -> Linear:
    """Dequantise `parts` one below the other: outputs come in their order. Raises ValueError if inputs differ."""
    width = parts[0].shape[-1]
    if any(len(part.shape) != 2 or part.shape[1] != width for part in parts):
        raise ValueError(f"matrices of different inputs cannot be merged: {[(p.name, p.shape) for p in parts]}")
    joined_bias = _join(bias, device, dtype) if bias else None
    return make_linear(_join(parts, device, dtype), joined_bias, prepack)


def _join(parts: Sequence[StoredWeight], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0].dequantize(dtype).to(device)
    return torch.cat([part.dequantize(dtype) for part in parts]).to(device)


def can_prepack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed products exist here and agree with the plain ones.

    The operators are torch's own but not a documented interface, so they are tried before they are trusted.
    """
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return False
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        weight = torch.linspace(-1, 1, 64 * 32).view(64, 32).to(dtype)
        x = torch.linspace(-1, 1, 2 * 32).view(2, 32).to(dtype)
        return torch.allclose(PrepackedLinear(weight, None)(x), F.linear(x, weight), rtol=2e-2, atol=2e-2)
    except (AttributeError, RuntimeError, TypeError):
        return False
