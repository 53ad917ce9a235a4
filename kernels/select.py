"""The one place where an implementation of `KernelBackend` is chosen.

Apart from the protocol, which the implementations import.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from .backend import DeviceBackend, DrawingBackend, KernelBackend, RecordingBackend

BACKENDS = ("auto", "cpu", "reference", "triton")


def select_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> KernelBackend:
    """The one selection point. `name` is "auto" or a backend's name; raises ValueError for one that is unknown or
    cannot run on the device, or a model of such heads."""
    if name not in BACKENDS:
        raise ValueError(f"unknown kernel backend {name!r}; known: {', '.join(BACKENDS)}")
    chosen = _native_name(device) if name == "auto" else name
    missing = _why_not(chosen, device, dtype, head_dim)
    if missing is not None and name != "auto":
        raise ValueError(f"the {name} backend cannot run here: {missing}")
    if missing is None and chosen == "triton":
        from .triton.backend import TritonBackend

        return TritonBackend(device, dtype)
    if missing is None and chosen == "cpu":
        from .cpu.backend import CpuBackend
        from .cpu.quota import usable_threads

        return CpuBackend(device, dtype, usable_threads(torch.get_num_threads()))
    from .reference.backend import ReferenceBackend

    return ReferenceBackend(device, dtype)


def fallback_note(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """A line that says why "auto" takes plain torch; None where it does not, or where plain torch was asked for."""
    reason = _why_not(_native_name(device), device, dtype, head_dim) if name == "auto" else None
    return f"plain torch serves, without the kernels for {device.type}: {reason}" if reason else None


def has_cpu_kernels(name: str, device: torch.device, head_dim: int) -> bool:
    """Whether `select_backend` takes the native CPU kernels, for bfloat16 too."""
    chosen = _native_name(device) if name == "auto" else name
    return chosen == "cpu" and _why_no_cpu(device, torch.bfloat16, head_dim) is None


def label(backend: KernelBackend) -> str:
    """Name and detail, for messages."""
    return f"{backend.name} ({backend.detail})" if backend.detail else backend.name


def _native_name(device: torch.device) -> str:
    return "triton" if device.type == "cuda" else "cpu"


def _why_not(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if name == "triton":
        return _why_no_triton(device)
    return _why_no_cpu(device, dtype, head_dim) if name == "cpu" else None


def _why_no_cpu(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cpu":
        return f"device {device.type} is not a CPU"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it computes in float32 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 16 or head_dim > 512:
        return f"attention heads of {head_dim} are no multiple of 16 up to 512"
    from .cpu.library import load_library, supported_isas

    if load_library() is None:
        return "the native library was not built (it takes a C compiler at installation, on x86-64 Linux)"
    return None if supported_isas() else "this CPU has no AVX2, FMA and F16C"


def _why_no_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"device {device.type} is not a GPU"
    # Without a card one may still plan for one.
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def as_device_backend(backend: KernelBackend) -> DeviceBackend | None:
    """The backend, if its decode steps run without the host."""
    return backend if isinstance(backend, DeviceBackend) else None


def as_drawing_backend(backend: KernelBackend) -> DrawingBackend | None:
    """The backend, if it draws tokens itself."""
    return backend if isinstance(backend, DrawingBackend) else None


def as_recording_backend(backend: KernelBackend) -> RecordingBackend | None:
    """The backend, if it runs recorded steps."""
    return backend if isinstance(backend, RecordingBackend) else None
