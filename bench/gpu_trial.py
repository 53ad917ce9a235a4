"""One kernel on one kind of inputs, for bench/gpu.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from gpu_measure import Setting


@dataclass(slots=True)
class Trial:
    """One set of inputs of a kernel."""

    run: Callable[[], object]
    error: Callable[[], float]
    """After `run`."""
    num_bytes: int
    """Read and written at least."""


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    make: Callable[[torch.Generator], Trial]
    limit: float
    timed: bool = True


def dtypes(setting: Setting) -> Iterator[tuple[torch.dtype, int | None]]:
    """Each dtype, and how many of the shapes it is for: what costs time is compiling."""
    if setting.dry:
        yield torch.float16, None
        return
    yield torch.bfloat16, None
    yield from ((dtype, 1 if setting.quick else 3) for dtype in (torch.float16, torch.float32))


def randn(size: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """On the generator's device."""
    return torch.randn(size, device=generator.device, generator=generator).to(dtype)
