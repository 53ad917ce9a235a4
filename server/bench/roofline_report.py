"""`octavo bench roofline` for people (one table) and for programs (JSON)."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .ceilings import Ceilings, Probe
from .roofline import Floor, ModelCost, StepCost, StepShape


@dataclass(frozen=True, slots=True)
class StepResult:
    """A measured step beside what it must cost."""

    shape: StepShape
    cost: StepCost
    floor: Floor
    seconds: list[float]
    """One per repeat."""

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def fraction(self) -> float:
        """Of the machine's limit that the median step reaches. Above 1 if caches spare it some of the bytes."""
        return self.floor.seconds / self.median_seconds


def print_ceilings(console: Console, ceilings: Ceilings, dtype: str) -> None:
    console.print("ceilings, best (median)")
    for name, probes, unit, scale in (
        ("read", ceilings.read, "GB/s", 1e9),
        ("copy", ceilings.copy, "GB/s read + written", 1e9),
        (f"{dtype} matmul", ceilings.matmul, "TFLOP/s", 1e12),
    ):
        shown = "; ".join(f"{p.name} {p.best / scale:.3g} ({p.median / scale:.3g})" for p in probes)
        console.print(f"  {name}: {shown} {unit}")
    console.print(
        f"  taken: {ceilings.bytes_per_second / 1e9:.3g} GB/s and {ceilings.flops_per_second / 1e12:.3g} TFLOP/s"
    )


def print_steps(console: Console, results: Sequence[StepResult], skipped: Sequence[tuple[StepShape, int]]) -> None:
    """`skipped`: steps that did not fit, with the bytes of pool that each needs."""
    title = "one step of the runner against the machine's limit"
    table = Table(title=title, title_style="", box=box.SIMPLE, padding=(0, 0, 0, 1))
    for heading in (
        *("step", "rows", "context", "new\ntokens", "K/V read\nMB", "all bytes\nMB", "GFLOP", "floor\nms", "bound\nby"),
        *("median\nms", "best\nms", "of the\nlimit", "tok/s"),
    ):
        table.add_column(heading, justify="left" if heading in ("step", "bound\nby") else "right", no_wrap=True)
    previous = ""
    for result in results:
        shape, cost = result.shape, result.cost
        if previous not in ("", shape.kind):
            table.add_section()
        previous = shape.kind
        table.add_row(
            shape.kind,
            f"{shape.num_rows}",
            f"{shape.num_context}",
            f"{shape.num_tokens}",
            f"{cost.kv_read_bytes / 1e6:.1f}",
            f"{cost.num_bytes / 1e6:.1f}",
            f"{cost.flops / 1e9:.2f}",
            f"{1e3 * result.floor.seconds:.2f}",
            result.floor.bound,
            f"{1e3 * result.median_seconds:.2f}",
            f"{1e3 * min(result.seconds):.2f}",
            f"{100 * result.fraction:.0f} %",
            f"{shape.num_tokens / result.median_seconds:.1f}",
        )
    console.print(table)
    for shape, num_bytes in skipped:
        console.print(f"skipped: {describe(shape)} needs {num_bytes / 2**30:.2f} GiB of K/V, more than can be had")


def describe(shape: StepShape) -> str:
    if shape.kind == "decode":
        return f"decode of {shape.num_rows} rows at {shape.num_context} tokens of context"
    return f"prefill of {shape.num_new} tokens after {shape.num_context} of context"


def as_json(
    model: ModelCost, ceilings: Ceilings, results: Sequence[StepResult], skipped: Sequence[tuple[StepShape, int]]
) -> dict[str, Any]:
    return {
        "model_cost": dataclasses.asdict(model),
        "ceilings": {
            "read_bytes_per_s": _probes_json(ceilings.read),
            "copy_bytes_per_s": _probes_json(ceilings.copy),
            "matmul_flops_per_s": _probes_json(ceilings.matmul),
            "taken": {"bytes_per_s": ceilings.bytes_per_second, "flops_per_s": ceilings.flops_per_second},
        },
        "steps": [_step_json(result) for result in results],
        "skipped": [{**dataclasses.asdict(shape), "kv_bytes": num_bytes} for shape, num_bytes in skipped],
    }


def _probes_json(probes: Sequence[Probe]) -> dict[str, dict[str, float]]:
    return {probe.name: {"best": probe.best, "median": probe.median} for probe in probes}


def _step_json(result: StepResult) -> dict[str, Any]:
    return {
        "kind": result.shape.kind,
        **dataclasses.asdict(result.shape),
        **dataclasses.asdict(result.cost),
        "num_bytes": result.cost.num_bytes,
        "floor_s": result.floor.seconds,
        "memory_s": result.floor.memory_seconds,
        "compute_s": result.floor.compute_seconds,
        "bound": result.floor.bound,
        "median_s": result.median_seconds,
        "best_s": min(result.seconds),
        "seconds": result.seconds,
        "fraction": result.fraction,
        "tokens_per_s": result.shape.num_tokens / result.median_seconds,
    }
