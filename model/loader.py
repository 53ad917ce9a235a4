"""From an opened checkpoint to a loaded model, checked before anything is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ..kernels.backend import KernelBackend
from .registry import CausalLM, family_of
from .sizes import size_text
from .spec import ModelError, ModelSpec
from .weights.dequantize import FLOAT_DTYPES
from .weights.quantized_weight import QuantizedWeight
from .weights.source import WeightSource


def check_weights(source: WeightSource) -> int:
    """Compare the checkpoint's headers with what its family needs; returns the number of parameters.

    Raises ModelError, in one line, for an unknown architecture, missing tensors, wrong shapes, or tensors that the
    family does not read: with them the model would be meant to compute something else.
    """
    if source.spec.transformers_config is not None:
        from .generic.weights import check

        return check(source)
    expected = list(family_of(source.spec).parameters(source.spec))
    present = set(source.names())
    missing = [name for name, _ in expected if name not in present]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"the checkpoint lacks tensor {missing[0]}{more}; it is incomplete, or its config names the wrong model"
        )
    unknown = sorted(name for name in present.difference(name for name, _ in expected) if not _is_idle(name, source))
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
    """Encoding and shape of every tensor that the family reads, as `KernelBackend.weight_bytes` wants them; call
    `check_weights` before. The generic path reads all that there are."""
    if source.spec.transformers_config is not None:
        weights = (source.weight(name) for name in source.names())
        return [(weight.encoding, tuple(weight.shape)) for weight in weights]
    expected = family_of(source.spec).parameters(source.spec)
    return [(source.weight(name).encoding, (1, *shape) if ".experts." in name else shape) for name, shape in expected]


def _is_idle(name: str, source: WeightSource) -> bool:
    """Whether a tensor changes nothing by going unread: RoPE's buffers of old checkpoints, copies of a tied table, and
    the biases of zeros that GPTQ's packers give to every matrix."""
    if name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and source.spec.tie_word_embeddings):
        return True
    matrix = f"{name.removesuffix('.bias')}.weight"
    if not name.endswith(".bias") or matrix not in source.names():
        return False
    return (
        isinstance(source.weight(matrix), QuantizedWeight) and not source.weight(name).dequantize(torch.float32).any()
    )


def dequantized_note(
    weights: Sequence[tuple[str, tuple[int, ...]]], backend: KernelBackend | None, dtype: torch.dtype
) -> str | None:
    """A line that says which quantised weights take more memory than their files, because `backend` does not keep them
    as they are stored; None where there are none. `weights` as `stored_weights` gives them; without a backend, which is
    the generic path, none are kept."""
    quantised = [(encoding, shape) for encoding, shape in weights if encoding not in FLOAT_DTYPES and len(shape) > 1]
    lost = [
        (encoding, math.prod(shape))
        for encoding, shape in quantised
        if backend is None or backend.weight_bytes([(encoding, shape)]) >= math.prod(shape) * dtype.itemsize
    ]
    if not lost:
        return None
    encodings = sorted({encoding for encoding, _ in lost})
    more = f" and {len(encodings) - 3} more" if len(encodings) > 3 else ""
    size = size_text(sum(count for _, count in lost) * dtype.itemsize)
    name = str(dtype).removeprefix("torch.")
    part = "" if len(lost) == len(quantised) else "partly "
    return f"weights are {part}{', '.join(encodings[:3])}{more}, served dequantised to {name} ({size})"


def load_model(source: WeightSource, backend: KernelBackend, progress: Callable[[float], None]) -> CausalLM:
    """Build the model; call `check_weights` before. `progress` gets the share done, from 0 to 1."""
    spec: ModelSpec = source.spec
    return family_of(spec)(spec, source, backend, progress)
