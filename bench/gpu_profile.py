"""For how long the card was busy, and with what, as torch's profiler (CUPTI) saw it; for bench/gpu.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gpu_measure import Setting
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

_NUM_KERNELS = 12


@dataclass(frozen=True, slots=True)
class Busy:
    """Of one step, on average."""

    per_step: float
    """Seconds in which at least one kernel ran; copies between host and device are not counted."""
    kernels: dict[str, float]
    """Seconds of the kernels that took the most, by name."""


def busy_seconds(step: Callable[[], object], count: int, setting: Setting) -> Busy:
    """Run `count` steps under the profiler. Each launches one step, its own or the next, so with the card idle before
    and after, the kernels of `count` steps are seen. Under the interpreter CPU operators stand in for kernels."""
    on_gpu = setting.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    setting.synchronize()
    with profile(activities=[activity]) as profiler:
        for _ in range(count):
            step()
        setting.synchronize()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    spans: list[tuple[float, float]] = []
    totals: Counter[str] = Counter()
    for event in profiler.events() or ():
        annotation = getattr(event, "is_user_annotation", False)
        if event.device_type != wanted or annotation or event.name.startswith(("Memcpy", "Memset", "ProfilerStep")):
            continue
        start, end = event.time_range.start * 1e-6, event.time_range.end * 1e-6
        spans.append((start, end))
        totals[event.name[:100]] += end - start
    kernels = {name: seconds / count for name, seconds in totals.most_common(_NUM_KERNELS)}
    return Busy(_union(spans) / count, kernels)


def _union(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that are in at least one span."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
