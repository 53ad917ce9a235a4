"""The one place where an implementation of `KernelBackend` is chosen.

Apart from the protocol, which the implementations import.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from .backend import DeviceBackend, DrawingBackend, KernelBackend, RecordingBackend

BACKENDS = ("auto", "reference", "triton")


def select_backend(name: str, device: torch.device, dtype: torch.dtype) -> KernelBackend:
    """The one selection point. `name` is "auto" or a backend's name; raises ValueError for one that is unknown or
    cannot run on the device."""
    if name not in BACKENDS:
        raise ValueError(f"unknown kernel backend {name!r}; known: {', '.join(BACKENDS)}")
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        missing = _why_no_triton(device)
        if missing is None:
            from .triton.backend import TritonBackend

            return TritonBackend(device, dtype)
        if name == "triton":
            raise ValueError(f"the triton backend cannot run here: {missing}")
    from .reference.backend import ReferenceBackend

    return ReferenceBackend(device, dtype)


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
