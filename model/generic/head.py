"""A causal language model without its decoder: what transformers makes of hidden states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_outputs import MoeModelOutputWithPast


class _Hidden(MoeModelOutputWithPast):  # type: ignore[misc]
    """Hidden states; whatever else a decoder may give back is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _Through(torch.nn.Module):
    """In the decoder's place: gives back what it is given, already normalised."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> _Hidden:
        return _Hidden(last_hidden_state=inputs_embeds)

    @property
    def decoder(self) -> Callable[..., _Hidden]:
        """OPT and its kin call a decoder within the decoder."""
        return self.forward


def head_of(module: Any) -> Any:
    """Called with `inputs_embeds`, the hidden states behind the final norm, [1, n, hidden]: head, scale and cap of the
    logits as transformers computes them. Shares the module's weights."""
    head = copy.copy(module)
    head._modules = dict(module._modules)
    head._modules[module.base_model_prefix] = _Through()
    return head
