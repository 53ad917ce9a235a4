"""Which families are known. A new one is a file in families/, a line here, and entries in weights/*_families.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from ..kernels.backend import KernelBackend
from .families.gemma import Gemma2ForCausalLM, Gemma3ForCausalLM
from .families.llama import LlamaForCausalLM
from .families.mixtral import MixtralForCausalLM
from .families.olmo import Olmo2ForCausalLM, OlmoeForCausalLM
from .families.phi3 import Phi3ForCausalLM
from .families.qwen3 import Qwen3ForCausalLM
from .layer_groups import LayerGroup
from .spec import ModelError, ModelSpec
from .text import one_line
from .weights.source import WeightSource


class CausalLM(Protocol):
    """A loaded model."""

    layer_groups: tuple[LayerGroup, ...]
    """Layers that attend to everything first, then those with a window; each layer is in one group."""

    def prepare(self, max_positions: int) -> None:
        """Build what depends on how long a sequence may be. Without it, the first forward pass prepares for as many
        positions as the model was trained for."""
        ...

    def forward(self, token_ids: torch.Tensor, plans: Sequence[Any], kv_layers: Sequence[torch.Tensor]) -> torch.Tensor:
        """All layers over all tokens of a step; K/V go to the pools.

        token_ids int64 [num_tokens]; plans[g]: the backend's for group g and these tokens; kv_layers[i]: layer i of its
        group's pool, [num_blocks, 2, num_kv_heads, block_size, head_dim] → the residual stream [num_tokens, hidden],
        not yet normalised.
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and head: [n, hidden] → [n, vocab], in the working dtype or fp32."""
        ...


class ModelFamily(Protocol):
    """What the registry holds: a class that declares its parameters and loads them."""

    def __call__(
        self, spec: ModelSpec, source: WeightSource, backend: KernelBackend, progress: Callable[[float], None]
    ) -> CausalLM: ...

    def parameters(self, spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor the family reads, by canonical name and shape."""
        ...


_FAMILIES: dict[str, ModelFamily] = {
    "Gemma2ForCausalLM": Gemma2ForCausalLM,
    "Gemma3ForCausalLM": Gemma3ForCausalLM,
    "GraniteForCausalLM": LlamaForCausalLM,
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": LlamaForCausalLM,
    "MixtralForCausalLM": MixtralForCausalLM,
    "Olmo2ForCausalLM": Olmo2ForCausalLM,
    "OlmoeForCausalLM": OlmoeForCausalLM,
    "Phi3ForCausalLM": Phi3ForCausalLM,
    "Qwen2ForCausalLM": LlamaForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3ForCausalLM,
}


def model_family(architecture: str) -> ModelFamily:
    """Raises ModelError for an architecture that no file here implements."""
    family = _FAMILIES.get(architecture)
    if family is None:
        known = ", ".join(sorted(_FAMILIES))
        name = one_line(architecture, 80) or "(none)"
        raise ModelError(f"the model's architecture {name} is not supported; known: {known}")
    return family
