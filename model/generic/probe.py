"""What each attention layer of a module asks for, seen by running the module once on the meta device.

Configs name windows, scales and caps in many ways, and modelling code reads them in more. So nothing is read here: the
attention function that the module calls notes the shapes and settings that it is given, and the window is taken from
the mask that transformers builds, whose rule is asked which keys it lets a query see. The meta device computes shapes
only; nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from ...kernels.backend import AttentionSpec
from .head import head_of
from .module import Unserved

_NAME = "octavo_probe"
_NUM_TOKENS = 4
_IGNORED = frozenset(
    {"dropout", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position"}
    | {"past_key_value", "past_key_values", "return_dict", "output_router_logits", "position_embeddings"}
    | {"sliding_window", "is_causal", "layer_idx", "deterministic"}
)
"""What changes nothing, or is said by the mask as well."""


@dataclass(frozen=True, slots=True)
class ProbedLayer:
    module: torch.nn.Module
    """That calls the attention function."""
    attention: AttentionSpec
    value_dim: int


@dataclass(frozen=True, slots=True)
class Probe:
    layers: tuple[ProbedLayer, ...]
    vocab_size: int
    """Columns of the logits."""


class _Observer:
    def __init__(self, num_positions: int) -> None:
        self.num_positions = num_positions
        self.layers: dict[int, ProbedLayer] = {}
        self._windows: list[tuple[torch.Tensor, int]] = []
        """Each mask that was built, and its window."""

    def mask(self, rule: Callable[..., torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        self._windows.append((mask, _window(rule, self.num_positions)))
        return mask

    def window(self, mask: torch.Tensor | None) -> int:
        if mask is None:
            return 0
        found = [window for known, window in self._windows if known is mask]
        if not found:
            raise Unserved("it changes the attention mask in a way that paged attention cannot follow")
        return found[0]


_observer: ContextVar[_Observer] = ContextVar("observer")


def probe(module: Any, num_positions: int, num_layers: int) -> Probe:
    """Run a module of the meta device once. `num_positions`: no sequence is longer. Raises Unserved for what paged
    attention cannot do."""
    observer = _Observer(num_positions)
    token = _observer.set(observer)
    try:
        with _implementation(module), torch.no_grad():
            ids = torch.zeros((1, _NUM_TOKENS), dtype=torch.int64, device="meta")
            positions = torch.arange(_NUM_TOKENS, device="meta")[None]
            # With a mask of its own, transformers does not look for sequences packed together, which takes values.
            padding = torch.ones_like(ids)
            decoder = module.base_model
            hidden = decoder(input_ids=ids, position_ids=positions, attention_mask=padding, use_cache=False)[0]
            logits = head_of(module)(inputs_embeds=hidden, use_cache=False).logits
    except Unserved:
        raise
    except Exception as error:
        first_line = " ".join(str(error).split())[:160]
        raise Unserved(f"transformers' code does not run as the generic path needs it: {first_line}") from error
    finally:
        _observer.reset(token)
    if sorted(observer.layers) != list(range(num_layers)):
        raise Unserved(
            f"{len(observer.layers)} of its {num_layers} layers attend; what the others keep of a sequence is not known"
        )
    return Probe(tuple(observer.layers[layer] for layer in range(num_layers)), logits.shape[-1])


@contextmanager
def _implementation(module: Any) -> Iterator[None]:
    """Attention that is noted, and experts whose products have the same shapes for any tokens."""
    before = module.config._attn_implementation, module.config._experts_implementation
    module.config._attn_implementation = _NAME
    if module._can_set_experts_implementation():
        module.config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        module.config._attn_implementation, module.config._experts_implementation = before


def _observe(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    observer = _observer.get()
    layer = getattr(module, "layer_idx", None)
    if type(layer) is not int or layer in observer.layers:
        raise Unserved("its attention layers are not numbered one by one")
    _refuse_other_settings(module, settings)
    value_dim = value.shape[-1]
    if query.shape[-1] != key.shape[-1] or value_dim > key.shape[-1] or query.shape[1] % key.shape[1]:
        raise Unserved(f"layer {layer} has heads of {query.shape[-1]}, {key.shape[-1]} and {value_dim} dimensions")
    if query.shape[2] != _NUM_TOKENS or key.shape[2] != _NUM_TOKENS:
        raise Unserved(f"layer {layer} attends to something other than the sequence's tokens")
    spec = AttentionSpec(
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=key.shape[-1],
        scale=key.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=observer.window(attention_mask),
        soft_cap=float(softcap or 0.0),
    )
    observer.layers[layer] = ProbedLayer(module, spec, value_dim)
    return query.new_empty((1, _NUM_TOKENS, query.shape[1], value_dim)), None


def _refuse_other_settings(module: torch.nn.Module, settings: dict[str, Any]) -> None:
    if settings.get("s_aux") is not None:
        raise Unserved("its attention has sinks, which paged attention does not know")
    if settings.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise Unserved("its attention looks ahead")
    unknown = sorted(name for name, value in settings.items() if value is not None and name not in _IGNORED)
    if unknown:
        raise Unserved(f"its attention asks for {unknown[0]}, which paged attention does not know")


def _build_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., torch.Tensor],
    use_vmap: bool = False,
    **others: Any,
) -> torch.Tensor:
    """In place of a mask: an empty one, whose rule the observer has read."""
    if use_vmap:
        raise Unserved("it has an attention mask of its own, which paged attention cannot follow")
    mask = torch.empty((batch_size, 1, q_length, kv_length), dtype=torch.bool, device="meta")
    return _observer.get().mask(mask_function, mask)


def _window(rule: Callable[..., torch.Tensor], num_positions: int) -> int:
    """Keys that a query sees at most, by a mask's rule; 0: all before it, of `num_positions`."""
    keys = torch.arange(num_positions)
    zero = torch.tensor(0)
    try:
        last = rule(zero, zero, torch.tensor(num_positions - 1), keys).expand(num_positions)
        window = int(last.sum())
        for query in {num_positions - 1, num_positions * 2 // 3, num_positions // 2, min(num_positions - 1, window), 0}:
            seen = rule(zero, zero, torch.tensor(query), keys).expand(num_positions)
            if not torch.equal(seen, (keys <= query) & (keys > query - window)):
                raise Unserved("its attention mask is neither causal nor a sliding window")
    except (RuntimeError, NotImplementedError):
        raise Unserved("its attention mask is neither causal nor a sliding window") from None
    return 0 if window == num_positions else window


AttentionInterface.register(_NAME, _observe)
AttentionMaskInterface.register(_NAME, _build_mask)
