"""From an opened checkpoint to a loaded model, checked before anything is read."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..kernels.backend import KernelBackend
from .registry import CausalLM, model_family
from .spec import ModelError, ModelSpec
from .weights.source import WeightSource


def check_weights(source: WeightSource) -> int:
    """Compare the checkpoint's headers with what its family needs; returns the number of parameters.

    Raises ModelError, in one line, for an unknown architecture, missing tensors or wrong shapes. Tensors that the
    family does not read are no error.
    """
    expected = list(model_family(source.spec.architecture).parameters(source.spec))
    present = set(source.names())
    missing = [name for name, _ in expected if name not in present]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"the checkpoint lacks tensor {missing[0]}{more}; it is incomplete, or its config names the wrong model"
        )
    for name, shape in expected:
        found = tuple(source.weight(name).shape)
        if found != shape:
            raise ModelError(
                f"tensor {name} has shape {list(found)}, but the config asks for {list(shape)}; "
                "config and weights do not belong together"
            )
    return sum(math.prod(shape) for _, shape in expected)


def load_model(source: WeightSource, backend: KernelBackend, progress: Callable[[float], None]) -> CausalLM:
    """Build the model; call `check_weights` before. `progress` gets the share done, from 0 to 1."""
    spec: ModelSpec = source.spec
    return model_family(spec.architecture)(spec, source, backend, progress)
