"""What this machine can do at best, measured: read memory, copy it, multiply matrices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...model.memory import free_memory
from ...model.spec import ModelSpec

_GIB = 2**30
_READ_BYTES = {"cpu": _GIB, "cuda": 4 * _GIB}
"""Many times the largest cache; a step's weights may still be partly cached, and then beat this ceiling."""
_REPEATS = 5
_SQUARES = {"cpu": (2048, 4096), "cuda": (4096, 8192)}
_MODEL_ROWS = {"cpu": 512, "cuda": 8192}
"""Tokens multiplied at once: a full step's."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One way to reach a ceiling, per second."""

    name: str
    best: float
    median: float


@dataclass(frozen=True, slots=True)
class Ceilings:
    read: list[Probe]
    """Bytes."""
    copy: list[Probe]
    """Bytes, read and written ones counted both."""
    matmul: list[Probe]
    """FLOPs, in the working dtype."""

    @property
    def bytes_per_second(self) -> float:
        return max(probe.best for probe in self.read)

    @property
    def flops_per_second(self) -> float:
        return max(probe.best for probe in self.matmul)


def synchronize(device: torch.device) -> None:
    """Wait for what was launched; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(call: Callable[[], object], device: torch.device, repeats: int, warm_ups: int = 1) -> list[float]:
    """Seconds of each of `repeats` calls, each waited for."""
    for _ in range(warm_ups):
        call()
    synchronize(device)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds


@torch.inference_mode()
def measure_ceilings(device: torch.device, dtype: torch.dtype, spec: ModelSpec) -> Ceilings:
    """Takes some seconds. `spec` gives the shapes of two of the matrix products."""
    read, copy = _memory(device, _affordable(device))
    return Ceilings(read, copy, _matmul(device, dtype, spec))


def _affordable(device: torch.device) -> int:
    return min(_READ_BYTES[device.type], free_memory(device).free_bytes // 4)


def _memory(device: torch.device, num_bytes: int) -> tuple[list[Probe], list[Probe]]:
    """Two operators that only read, with every thread they care to use: which is faster differs by machine."""
    width = 4096
    rows = max(2, num_bytes // 4 // width)
    buffer = torch.ones((rows, width), dtype=torch.float32, device=device)
    vector = torch.ones(width, dtype=torch.float32, device=device)
    read = [
        _probe("sum", buffer.nbytes, buffer.sum, device),
        _probe("matrix × vector", buffer.nbytes, lambda: torch.mv(buffer, vector), device),
    ]
    source, target = buffer[: rows // 2], buffer[rows // 2 : rows // 2 * 2]
    return read, [_probe("buffer to buffer", 2 * source.nbytes, lambda: target.copy_(source), device)]


def _matmul(device: torch.device, dtype: torch.dtype, spec: ModelSpec) -> list[Probe]:
    """The model's largest layers at a full step's tokens, and squares, as torch multiplies them."""
    rows = _MODEL_ROWS[device.type]
    shapes = [
        (rows, spec.hidden_size, 2 * spec.intermediate_size),
        (rows, spec.intermediate_size, spec.hidden_size),
        *((side, side, side) for side in _SQUARES[device.type]),
    ]
    return [_multiply(shape, device, dtype) for shape in shapes]


def _multiply(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Probe:
    num_rows, num_in, num_out = shape
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn((num_rows, num_in), dtype=dtype, device=device, generator=generator)
    weight = torch.randn((num_out, num_in), dtype=dtype, device=device, generator=generator)
    flops = 2 * num_rows * num_in * num_out
    return _probe(f"{num_rows} × {num_in} × {num_out}", flops, lambda: F.linear(x, weight), device)


def _probe(name: str, amount: int, call: Callable[[], object], device: torch.device) -> Probe:
    seconds: Sequence[float] = time_calls(call, device, _REPEATS)
    return Probe(name, amount / min(seconds), amount / statistics.median(seconds))
