"""A model that no family here implements: transformers' modelling code over our paged pool.

All tokens of a step stand in one row, [1, num_tokens], whatever sequences they are of: only attention looks across
tokens, and that is ours. There is no cache object; positions are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ...kernels.backend import KernelBackend
from ..layer_groups import LayerGroup, layer_groups
from ..spec import ModelSpec
from ..weights.source import WeightSource
from .attention import ATTRIBUTE, PagedAttention, Step
from .head import head_of
from .module import build_module
from .probe import probe
from .weights import fill, parameter_shapes


class GenericCausalLM:
    """Implements `registry.PositionedCausalLM`, and as a class `registry.ModelFamily`."""

    def __init__(
        self, spec: ModelSpec, source: WeightSource, backend: KernelBackend, progress: Callable[[float], None]
    ) -> None:
        """Loads everything; the source was checked by `weights.check`. `progress` gets the share done, 0 to 1."""
        assert spec.transformers_config is not None
        self._spec = spec
        self._backend = backend
        self.layer_groups: tuple[LayerGroup, ...] = layer_groups(spec)
        self._module = build_module(spec.architecture, spec.transformers_config, backend.dtype)
        layers = probe(self._module, spec.max_position_embeddings, spec.num_hidden_layers).layers
        fill(self._module, source, backend.device, progress)
        self._step = Step()
        for index, group in enumerate(self.layer_groups):
            for layer in group.layer_ids:
                attention = PagedAttention(backend, group.attention, layer, index, self._step)
                setattr(layers[layer].module, ATTRIBUTE, attention)
        self._positions = torch.empty(0, dtype=torch.int64)
        self._decoder = self._module.base_model
        self._head = head_of(self._module)
        progress(1.0)

    @classmethod
    def parameters(cls, spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Of the module; a checkpoint may name them otherwise, and keep them in other parts."""
        assert spec.transformers_config is not None
        return iter(parameter_shapes(build_module(spec.architecture, spec.transformers_config, torch.float32)))

    def prepare(self, max_positions: int) -> None:
        table = torch.zeros((max_positions, 2), dtype=torch.float32, device=self._backend.device)
        table[:, 0] = 1
        self._step.no_rotation = table

    def place(self, positions: torch.Tensor) -> None:
        self._positions = positions

    def forward(self, token_ids: torch.Tensor, plans: Sequence[Any], kv_layers: Sequence[torch.Tensor]) -> torch.Tensor:
        if not self._step.no_rotation.numel():
            self.prepare(self._spec.max_position_embeddings)
        step = self._step
        step.plans, step.kv_layers = plans, kv_layers
        try:
            output = self._decoder(input_ids=token_ids[None], position_ids=self._positions[None], use_cache=False)
        finally:
            step.plans = step.kv_layers = ()
        hidden: torch.Tensor = output[0][0]  # normalised already
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits
