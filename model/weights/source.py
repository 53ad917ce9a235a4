"""Where weights come from: one protocol for safetensors directories and GGUF files."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from ...kernels.weights import StoredWeight
from ..spec import ModelSpec


class WeightSource(Protocol):
    """An opened checkpoint. Opening reads and checks headers only; no tensor data is touched.

    Names are Hugging Face's ("model.layers.0.self_attn.q_proj.weight"), whatever the file calls them, and values
    are in Hugging Face's layout (GGUF's permuted llama q/k rows come back un-permuted).
    """

    spec: ModelSpec

    def names(self) -> Collection[str]: ...

    def weight(self, name: str) -> StoredWeight:
        """Raises ModelError naming the tensor if it is absent."""
        ...
