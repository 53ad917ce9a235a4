"""What all sections of bench/gpu.py share: the setting, the clock, timing on a GPU, errors, and a row of the table."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

GIB = 2**30
_SLEEP_CYCLES = 2_000_000
"""Of the card, about a millisecond, during which the host queues what is timed."""
_ROUND_SECONDS = 1e-3
_TIMED_SECONDS = 0.05
"""All rounds of one timing together, about."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and on what the sections run."""

    device: torch.device
    dtype: torch.dtype
    """bf16 on a GPU; fp32 under the interpreter, whose bf16 products are wrong."""
    capability: tuple[int, int]
    dry: bool
    """Tiny shapes under Triton's interpreter: everything runs, no time means anything."""
    quick: bool
    seed: int
    """Of all inputs; another one in every run, unless it is given."""

    @property
    def cold_bytes(self) -> int:
        """What must be touched before anything is touched again, so that a cache is not what is measured."""
        if self.dry:
            return 0
        return max(256 * 2**20, 4 * torch.cuda.get_device_properties(self.device).L2_cache_size)

    def num_sets(self, set_bytes: int) -> int:
        """How many sets of inputs of so many bytes a timing takes in turn."""
        return max(1, min(256, -(-self.cold_bytes // max(1, set_bytes))))

    def generator(self, salt: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed((self.seed + salt) % 2**63)

    def free_bytes(self) -> int:
        """Of the device; what torch keeps for later counts as free. A dry run makes do with little."""
        if self.dry:
            return 64 * 2**20
        gc.collect()
        torch.cuda.empty_cache()
        free: int = torch.cuda.mem_get_info(self.device)[0]
        return free

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Clock:
    """How long a section may go on. What does not fit any more is listed as skipped."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds, negative when they are up."""
        return self._end - time.monotonic()


@dataclass(slots=True)
class Row:
    """One line of the table, and one object of the JSON file."""

    section: str
    case: str
    seconds: float | None = None
    """Of one launch, or of one step; the median."""
    rate: float | None = None
    unit: str = ""
    fraction: float | None = None
    """Of the ceiling that was measured in this run."""
    error: float | None = None
    """Relative, against the reference; for draws the share of rows that drew another token."""
    limit: float | None = None
    """The largest error that passes."""
    failure: str | None = None
    """One line: ours raised, or is wrong."""
    notes: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    """Everything else that was measured."""

    def check(self, error: float, limit: float) -> None:
        """Note an error; beyond the limit, the row has failed."""
        self.error, self.limit = error, limit
        if not error <= limit:
            self.failure = f"error {error:.1e}, and {limit:.0e} is allowed"


@dataclass(frozen=True, slots=True)
class Ceilings:
    copy: float
    """Bytes per second of a device-to-device copy, read and written ones counted both."""
    matmul: float
    """FLOPs per second of a product of large square matrices."""


@dataclass(slots=True)
class State:
    """What a section is given."""

    setting: Setting
    ceilings: Ceilings
    rows: list[Row]
    """Of the sections before."""
    clock: Clock


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call."""

    median: float
    best: float
    rounds: int


def attempt(row: Row, work: Callable[[Row], None]) -> Row:
    """Run one case; what it raises is the row's failure, and the other cases go on."""
    try:
        work(row)
    except torch.OutOfMemoryError:
        row.notes.append("out of memory")
        gc.collect()
    except Exception as error:
        row.failure = one_line(error)
    return row


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def time_calls(calls: Sequence[Callable[[], object]], setting: Setting) -> Timing:
    """Time per call, over rounds in which every call comes at least once.

    Each call should have inputs of its own (`Setting.num_sets`). All calls of a round are one replayed graph, or, where
    they cannot be captured, queued while the card is kept busy: the time between launches is not the host's.
    """
    if setting.device.type != "cuda":
        started = time.perf_counter()
        calls[0]()
        seconds = time.perf_counter() - started
        return Timing(seconds, seconds, 1)
    for call in calls:
        call()  # compiles, and lets libraries allocate
    setting.synchronize()
    once = _round_seconds(lambda: _run(calls))
    calls = [*calls] * max(1, min(32, int(_ROUND_SECONDS / max(once, 1e-6))))
    play = _captured(calls)
    _round_seconds(play)
    per_round = max(_round_seconds(play), 1e-6)
    num_rounds = max(5, min(50, int(_TIMED_SECONDS / per_round)))
    rounds = [_round_seconds(play) / len(calls) for _ in range(num_rounds)]
    return Timing(statistics.median(rounds), min(rounds), num_rounds)


def _run(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _captured(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            _run(calls)
    except RuntimeError:  # something of it waits for the device, or allocates in a way that graphs do not know
        torch.cuda.synchronize()
        return lambda: _run(calls)
    return graph.replay


def _round_seconds(play: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]
    begin.record()
    play()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds * 1e-3


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found - expected‖ / ‖expected‖ in fp64; infinite where a value is NaN or infinite."""
    expected = expected.double()
    error = float((found.double() - expected).norm() / expected.norm().clamp(min=1e-300))
    return error if math.isfinite(error) else math.inf


ERROR_LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative errors that rounding explains."""


def measure_ceilings(setting: Setting) -> tuple[Ceilings, list[Row]]:
    """What the card can do at best: copy memory, multiply matrices. On random data: constants are faster."""
    num_bytes = 2**20 if setting.dry else min(2 * GIB, setting.free_bytes() // 8)
    copy = Row("ceilings", f"copy {num_bytes / GIB:.1f} GiB", _copy_seconds(setting, num_bytes), unit="GB/s")
    side = 64 if setting.dry else 8192
    name = str(setting.dtype).removeprefix("torch.")
    matmul = Row("ceilings", f"{name} {side} × {side} × {side}", _matmul_seconds(setting, side), unit="TFLOP/s")
    ceilings = Ceilings(2 * num_bytes / (copy.seconds or math.inf), 2 * side**3 / (matmul.seconds or math.inf))
    copy.rate, matmul.rate = ceilings.copy / 1e9, ceilings.matmul / 1e12
    return ceilings, [copy, matmul]


def _copy_seconds(setting: Setting, num_bytes: int) -> float:
    source = torch.empty(num_bytes // 8, dtype=torch.int64, device=setting.device)
    source.random_(generator=setting.generator())
    target = torch.empty_like(source)
    return time_calls([lambda: target.copy_(source)], setting).median


def _matmul_seconds(setting: Setting, side: int) -> float:
    generator = setting.generator()
    matrices = [
        torch.randn((side, side), dtype=setting.dtype, device=setting.device, generator=generator) for _ in range(4)
    ]
    pairs = ((matrices[0], matrices[1]), (matrices[2], matrices[3]))
    return time_calls([lambda x=x, w=w: F.linear(x, w) for x, w in pairs], setting).median  # type: ignore[misc]
