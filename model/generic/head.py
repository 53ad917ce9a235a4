"""A causal language model without its decoder: what transformers makes of hidden states."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import MoeModelOutputWithPast


@dataclass
class _Hidden(MoeModelOutputWithPast):  # type: ignore[misc]
    """What any decoder here may have beside its hidden states, all of it None."""

    cross_attentions: Any = None


class _Through(torch.nn.Module):
    """In the decoder's place: gives back what it is given, already normalised."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> _Hidden:
        return _Hidden(last_hidden_state=inputs_embeds)


def head_of(module: Any) -> Any:
    """Called with `inputs_embeds`, the hidden states behind the final norm, [1, n, hidden]: head, scale and cap of the
    logits as transformers computes them. Shares the module's weights."""
    head = copy.copy(module)
    head._modules = dict(module._modules)
    through = _Through()
    through.decoder = through.forward  # OPT and its kin call a decoder within the decoder
    head._modules[module.base_model_prefix] = through
    return head
