"""The one place where an implementation of `KernelBackend` is chosen.

Apart from the protocol, which the implementations import.
"""

from __future__ import annotations

import torch

from .backend import KernelBackend


def select_backend(name: str, device: torch.device, dtype: torch.dtype) -> KernelBackend:
    """The one selection point. `name` is "auto" or a backend's name; raises ValueError for an unknown one."""
    if name in ("auto", "reference"):
        from .reference.backend import ReferenceBackend

        return ReferenceBackend(device, dtype)
    raise ValueError(f"unknown kernel backend {name!r}; known: auto, reference")
