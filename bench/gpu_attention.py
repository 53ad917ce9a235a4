"""How fast decode and prefill attention are, for bench/gpu.py, and what others take for the same work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gpu_kernels import attention_error, decode_settings, launch_decode, launch_prefill, prefill_settings
from gpu_measure import ERROR_LIMITS, GIB, Row, Setting, State, attempt, one_line, time_calls
from gpu_paged import NoisePool, Paged, Shape
from gpu_rivals import TORCH_PREFILL, FlashInferDecode

LLAMA_8B = Shape("Llama-3.1-8B", 32, 8, 128)
DECODE_SHAPES = (
    LLAMA_8B,
    Shape("Qwen3-32B", 64, 8, 128),
    Shape("Llama-2-7B (MHA)", 32, 32, 128),
    Shape("Gemma-3-12B window", 16, 8, 256, window=1024),
    Shape("Gemma-2-9B window, cap", 16, 8, 256, window=4096, soft_cap=50.0),
    Shape("Llama-3.2-1B", 32, 8, 64),
)
DRY_SHAPES = (Shape("toy", 4, 2, 16), Shape("toy MHA window", 2, 2, 16, window=20))
BLOCK = 32
POOL_BYTES = 24 * GIB
"""At most; more than any launch here reads."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What docs/gpu.md calls met, for launches that read so many bytes of K/V."""

    min_bytes: int
    max_bytes: int
    fraction: float | None = None
    """Of the copy bandwidth, at least."""
    seconds: float | None = None
    """At most."""


GOALS = (
    Goal(512 * 10**6, 10**15, fraction=0.90),
    Goal(130 * 10**6, 512 * 10**6, fraction=0.60),
    Goal(17 * 10**6, 34 * 10**6, seconds=20e-6),
    Goal(0, 17 * 10**6, seconds=15e-6),
)
"""Those in seconds are meant for an H200."""


# ---- Decode ----------------------------------------------------------------------------------------------------------


def decode_works(setting: Setting) -> Iterator[tuple[Shape, str, list[int]]]:
    """(shape, label, context of each row)."""
    if setting.dry:
        for shape in DRY_SHAPES:
            yield shape, "2 × 40", [40] * 2
        yield DRY_SHAPES[0], "skewed: 70 and 5", [70, 5]
        return
    for shape in DECODE_SHAPES:
        full = shape is LLAMA_8B and not setting.quick
        for batch in (1, 8, 32, 128, 256) if full else (1, 32, 256):
            for context in (256, 1024, 4096, 16384, 32768) if full else (1024, 4096, 32768):
                yield shape, f"{batch} × {context}", [context] * batch
        yield shape, "skewed: 32768 and 31 × 512", [32768] + [512] * 31
        yield shape, "skewed: 64 rows, 256 to 32768", [round(256 * 128 ** (i / 63)) for i in range(64)]
    yield LLAMA_8B, "skewed: 255 × 300 and 32768", [300] * 255 + [32768]


def run_decode(state: State) -> Iterator[Row]:
    setting = state.setting
    pool = NoisePool(setting, pool_bytes(setting))
    for shape, label, contexts in decode_works(setting):
        row = Row("decode", f"{shape.name}, {label}", unit="GB/s")
        if state.clock.left <= 0:
            row.notes.append("skipped: out of time")
            yield row
            continue
        yield attempt(row, lambda row, s=shape, c=contexts: _decode(row, state, pool, s, c))  # type: ignore[misc]


def pool_bytes(setting: Setting) -> int:
    return min(8 * GIB if setting.quick else POOL_BYTES, setting.free_bytes() * 2 // 5)


def _decode(row: Row, state: State, pool: NoisePool, shape: Shape, contexts: list[int]) -> None:
    setting = state.setting
    sets = pool.launches(shape, [1] * len(contexts), contexts, BLOCK)
    if not sets:
        row.notes.append("skipped: more K/V than the pool of this run holds")
        return
    config = decode_settings(setting, shape, BLOCK, setting.dtype)
    launches = [launch_decode(paged, config) for paged in sets]
    launches[0]()
    lengths = sorted(range(len(contexts)), key=contexts.__getitem__)
    looked_at = sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})
    error = float("inf") if sets[0].out.isnan().any() else attention_error(sets[0], looked_at)
    row.check(error, ERROR_LIMITS[setting.dtype])
    if row.failure:
        return
    timing = time_calls(launches, setting)
    num_bytes = sets[0].read_bytes()
    row.seconds, row.rate = timing.median, num_bytes / timing.median / 1e9
    row.fraction = num_bytes / timing.median / state.ceilings.copy
    row.values |= {"bytes": num_bytes, "best_s": timing.best, "num_sets": len(sets), "contexts": _summary(contexts)}
    _note_goal(row, num_bytes, setting)
    _note_flashinfer(row, sets, setting, timing.median)


def _summary(contexts: Sequence[int]) -> dict[str, int]:
    return {"rows": len(contexts), "min": min(contexts), "max": max(contexts), "sum": sum(contexts)}


def _note_goal(row: Row, num_bytes: int, setting: Setting) -> None:
    goal = next((goal for goal in GOALS if goal.min_bytes <= num_bytes < goal.max_bytes), None)
    if goal is None or setting.dry or row.seconds is None or row.fraction is None:
        return
    met = row.fraction >= goal.fraction if goal.fraction is not None else row.seconds <= (goal.seconds or 0.0)
    wanted = f"{100 * goal.fraction:.0f} %" if goal.fraction is not None else f"{1e6 * (goal.seconds or 0):.0f} µs"
    row.values["goal_met"] = met
    row.notes.append(f"goal {wanted} {'met' if met else 'missed'}")


def _note_flashinfer(row: Row, sets: Sequence[Paged], setting: Setting, ours: float) -> None:
    """FlashInfer's wrapper over the same pool and tables, where it is installed; its failures are its own."""
    if not FlashInferDecode.is_here(setting):
        return
    try:
        # Each wrapper has buffers of its own, also in the host's pinned memory.
        rivals = [FlashInferDecode(paged) for paged in sets[:64]]
        difference = rivals[0].error(sets[0])
        timing = time_calls([rival.run for rival in rivals], setting)
    except Exception as error:
        row.notes.append(f"FlashInfer: {one_line(error)[:80]}")
        return
    row.values |= {"flashinfer_s": timing.median, "flashinfer_difference": difference}
    row.notes.append(f"FlashInfer {1e6 * timing.median:.1f} µs ({timing.median / ours:.2f}×)")


# ---- Prefill ---------------------------------------------------------------------------------------------------------


def prefill_works(setting: Setting) -> Iterator[tuple[Shape, str, list[int], list[int]]]:
    """(shape, label, queries of each row, context of each row)."""
    if setting.dry:
        yield DRY_SHAPES[0], "2 × 20", [20, 20], [20, 20]
        yield DRY_SHAPES[0], "10 after 30", [10], [40]
        return
    mixed = [4096, 2048, 1024, 512, 256, 128, 64, 33]
    for shape in DECODE_SHAPES:
        yield shape, "1 × 8192", [8192], [8192]
        yield shape, "4 × 2048", [2048] * 4, [2048] * 4
        if setting.quick and shape is not LLAMA_8B:
            continue
        yield shape, "32 × 128", [128] * 32, [128] * 32
        yield shape, "mixed, 33 to 4096", mixed, mixed
        yield shape, "4 × 1024 after 4096", [1024] * 4, [5120] * 4
        yield shape, "1 × 512 after 32768", [512], [33280]


def run_prefill(state: State) -> Iterator[Row]:
    setting = state.setting
    pool = NoisePool(setting, min(4 * GIB, pool_bytes(setting)))
    for shape, label, queries, contexts in prefill_works(setting):
        row = Row("prefill", f"{shape.name}, {label}", unit="TFLOP/s")
        if state.clock.left <= 0:
            row.notes.append("skipped: out of time")
            yield row
            continue
        yield attempt(row, lambda row, s=shape, q=queries, c=contexts: _prefill(row, state, pool, s, q, c))  # type: ignore[misc]


def _prefill(row: Row, state: State, pool: NoisePool, shape: Shape, queries: list[int], contexts: list[int]) -> None:
    setting = state.setting
    sets = pool.launches(shape, queries, contexts, BLOCK)[:4]
    if not sets:
        row.notes.append("skipped: more K/V than the pool of this run holds")
        return
    config = prefill_settings(setting, shape, BLOCK, setting.dtype)
    launches = [launch_prefill(paged, config) for paged in sets]
    launches[0]()
    error = float("inf") if sets[0].out.isnan().any() else attention_error(sets[0], range(len(queries)))
    row.check(error, ERROR_LIMITS[setting.dtype])
    if row.failure:
        return
    timing = time_calls(launches, setting)
    flops = 4 * shape.num_heads * shape.head_dim * sets[0].num_pairs()
    row.seconds, row.rate = timing.median, flops / timing.median / 1e12
    row.fraction = flops / timing.median / state.ceilings.matmul
    row.values |= {"flops": flops, "best_s": timing.best}
    _note_torch(row, sets, setting, timing.median)


def _note_torch(row: Row, sets: Sequence[Paged], setting: Setting, ours: float) -> None:
    """torch's own attention over dense copies of the same keys and values, which it is given for nothing."""
    for name, make in TORCH_PREFILL.items():
        try:
            rivals = [make(paged) for paged in sets]
            if rivals[0] is None:
                continue
            difference = rivals[0].error(sets[0])
            timing = time_calls([rival.run for rival in rivals if rival is not None], setting)
        except Exception as error:
            row.notes.append(f"{name}: {one_line(error)[:60]}")
            continue
        row.values |= {f"{name}_s": timing.median, f"{name}_difference": difference}
        row.notes.append(f"{name} {1e6 * timing.median:.0f} µs ({timing.median / ours:.2f}×)")
