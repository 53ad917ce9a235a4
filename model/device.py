"""Which device and dtype a model runs with: resolved once, at start."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..kernels.select import has_cpu_kernels
from .registry import family_note
from .spec import ModelError, ModelSpec

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NATIVE_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})


def resolve_device(name: str) -> torch.device:
    """ "auto" takes a CUDA device if torch finds one. Raises ModelError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        built = "finds no CUDA device" if torch.version.cuda else "was built without CUDA"
        raise ModelError(f"device cuda was asked for, but this torch {built}; use device cpu or auto")
    if name not in ("cpu", "cuda"):
        raise ModelError(f"unknown device {name!r}; known: auto, cpu, cuda")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device, kernel_backend: str, spec: ModelSpec) -> torch.dtype:
    """ "auto" is bfloat16 where the device multiplies it natively, and where the native CPU kernels compute the whole
    model: with it they multiply quantised weights as the integers that they are, on any instruction set, and dense ones
    as fast as in float32. Else float32. Raises ModelError for the unknown."""
    if name == "auto":
        native = family_note(spec) is None and has_cpu_kernels(kernel_backend, device, spec.head_dim)
        return torch.bfloat16 if native or _has_native_bfloat16(device) else torch.float32
    if name not in _DTYPES:
        raise ModelError(f"unknown dtype {name!r}; known: auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _has_native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(_cpu_flags() & _NATIVE_BF16_FLAGS)


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """Instruction sets as Linux names them; empty elsewhere, where float32 is the safe choice."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


def ids_to_device(ids: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64 [n]. A tensor made on the device from a list would wait for all that is queued there."""
    return to_device(np.array(ids, np.int64), device)


def to_device(array: npt.NDArray[np.generic[Any]], device: torch.device) -> torch.Tensor:
    """A copy on the device, or the array itself on a CPU."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        # Only from pinned memory does the copy run beside the host's work.
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
