"""How a weight reaches a backend: as its file stores it, so that a backend may keep it quantised."""

from __future__ import annotations

from typing import Protocol

import torch


class StoredWeight(Protocol):
    """One tensor of a checkpoint, still in the file's own encoding (usually mapped memory, not yet read)."""

    @property
    def name(self) -> str:
        """The canonical name (Hugging Face's), for messages."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """As torch shapes it: a linear layer's weight is [out_features, in_features]."""
        ...

    @property
    def encoding(self) -> str:
        """GGML's name of the element encoding: F32, F16, BF16, Q4_0, Q4_1, Q8_0, Q4_K, …"""
        ...

    def raw(self) -> torch.Tensor:
        """The stored bytes. uint8 [prod(shape[:-1]), bytes_per_row]; a view of mapped memory, never written."""
        ...

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The values, computed in fp32 and rounded once to `dtype`. CPU, contiguous, `shape`; a fresh tensor."""
        ...
