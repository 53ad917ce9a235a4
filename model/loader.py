"""From an opened checkpoint to a loaded model, checked before anything is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from ..kernels.backend import KernelBackend
from .registry import CausalLM, model_family
from .spec import ModelError, ModelSpec
from .weights.source import WeightSource


def check_weights(source: WeightSource) -> int:
    """Compare the checkpoint's headers with what its family needs; returns the number of parameters.

    Raises ModelError, in one line, for an unknown architecture, missing tensors, wrong shapes, or tensors that the
    family does not read: with them the model would be meant to compute something else.
    """
    expected = list(model_family(source.spec.architecture).parameters(source.spec))
    present = set(source.names())
    _refuse_partial_bias(present)
    missing = [name for name, _ in expected if name not in present]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"the checkpoint lacks tensor {missing[0]}{more}; it is incomplete, or its config names the wrong model"
        )
    unknown = sorted(
        name for name in present.difference(name for name, _ in expected) if not _is_idle(name, source.spec)
    )
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ModelError(
            f"the checkpoint holds tensor {unknown[0][:100]!r}{more}, which is not part of a "
            f"{source.spec.architecture}; this variant of the model is not supported"
        )
    for name, shape in expected:
        found = tuple(source.weight(name).shape)
        if found != shape:
            raise ModelError(
                f"tensor {name} has shape {list(found)}, but the config asks for {list(shape)}; "
                "config and weights do not belong together"
            )
    return sum(math.prod(shape) for _, shape in expected)


def stored_weights(source: WeightSource) -> list[tuple[str, tuple[int, ...]]]:
    """Encoding and shape of every tensor that the family reads; call `check_weights` before."""
    expected = model_family(source.spec.architecture).parameters(source.spec)
    return [(source.weight(name).encoding, shape) for name, shape in expected]


def _refuse_partial_bias(names: Collection[str]) -> None:
    on_input = any(name.endswith((".q_proj.bias", ".k_proj.bias", ".v_proj.bias")) for name in names)
    if on_input and not any(name.endswith(".o_proj.bias") for name in names):
        raise ModelError("biases on q/k/v without o are not supported yet; choose another model")


def _is_idle(name: str, spec: ModelSpec) -> bool:
    """Whether a tensor changes nothing by going unread: RoPE's buffers of old checkpoints, copies of a tied table."""
    return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and spec.tie_word_embeddings)


def load_model(source: WeightSource, backend: KernelBackend, progress: Callable[[float], None]) -> CausalLM:
    """Build the model; call `check_weights` before. `progress` gets the share done, from 0 to 1."""
    spec: ModelSpec = source.spec
    return model_family(spec.architecture)(spec, source, backend, progress)
