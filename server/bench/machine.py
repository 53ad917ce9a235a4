"""What machine a measurement was made on: a number without it says nothing. Torch-free at import."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Machine:
    """The host, whatever computes on it. No names of hosts or users: results are meant to be shown."""

    cpu: str
    num_cores: int
    """That this process may use."""
    memory_bytes: int
    system: str
    python: str
    octavo: str


@dataclass(frozen=True, slots=True)
class TorchSetup:
    """What torch computes with."""

    torch: str
    device: str
    """cpu, or cuda and the card's name."""
    num_threads: int
    """Of one operator on the CPU."""


def describe_machine() -> Machine:
    return Machine(
        cpu=_cpu_name(),
        num_cores=_num_cores(),
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        octavo=version("octavo"),
    )


def describe_torch(device: str) -> TorchSetup:
    """`device` as torch writes it: cpu, cuda, cuda:0. Imports torch."""
    import torch

    name = device
    if device.startswith("cuda"):
        name = f"{device} ({torch.cuda.get_device_name(torch.device(device))})"
    return TorchSetup(torch=torch.__version__, device=name, num_threads=torch.get_num_threads())


def machine_line(machine: Machine, setup: TorchSetup | None = None) -> str:
    """One line for people."""
    parts = [
        f"{machine.cpu}, {machine.num_cores} cores, {machine.memory_bytes / 2**30:.0f} GiB",
        f"{machine.system}, Python {machine.python}",
    ]
    if setup is not None:
        threads = "1 thread" if setup.num_threads == 1 else f"{setup.num_threads} threads"
        parts.append(f"torch {setup.torch} on {setup.device}, {threads}")
    return "; ".join(parts)


def _cpu_name() -> str:
    """As Linux names it; elsewhere what Python knows, which may only be the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _num_cores() -> int:
    """A container or taskset may leave less than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
