"""One command for a machine with a GPU: are the kernels right, and how fast is everything?

    .venv/bin/python bench/gpu.py                      every section, within eight minutes
    .venv/bin/python bench/gpu.py --quick              fewer shapes and one model, about three minutes
    .venv/bin/python bench/gpu.py --sections kernels decode
    .venv/bin/python bench/gpu.py --dry-run            tiny shapes under Triton's interpreter; implied without a GPU

It needs no network and no model file: weights are random (model/weights/dummy.py). Of packages it needs torch, triton,
numpy, psutil and msgspec, which the engine's messages are made of; nothing of HTTP is imported. transformers and
FlashInfer are compared with where they are installed. A checkout is enough: Octavo itself need not be installed.
docs/gpu.md explains the sections and the columns.

Everything measured goes to bench/results/gpu_<device>.json, or to --out; a dry run writes only there. Status 1 if a
kernel is wrong or one of our own parts failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import platform
import re
import sys
import time
import types
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 460
QUICK_BUDGET_S = 170
WEIGHTS = {"kernels": 22, "decode": 20, "prefill": 10, "engine": 30, "transformers": 18}
"""Shares of the time. What a section leaves over goes to those behind it."""
SECTIONS = ("ceilings", *WEIGHTS)


def prepare(argv: list[str]) -> bool:
    """Before anything imports triton: whether this is a dry run, for which the interpreter is switched on; and Octavo's
    rooms as `octavo`, where it is not installed."""
    dry = "--dry-run" in argv or not torch.cuda.is_available()
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("octavo") is None:
        namespace = types.ModuleType("octavo")
        namespace.__path__ = [str(ROOT)]
        sys.modules["octavo"] = namespace
    return dry


def section(name: str) -> Callable[[Any], Iterator[Any]]:
    """Imported when its turn comes, so that what one section lacks stops no other."""
    if name == "kernels":
        from gpu_kernels import run
    elif name == "decode":
        from gpu_attention import run_decode as run
    elif name == "prefill":
        from gpu_attention import run_prefill as run
    elif name == "engine":
        from gpu_engine import run
    else:
        from gpu_transformers import run
    return run


def describe(setting: Any) -> dict[str, Any]:
    def package(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    on_gpu = setting.device.type == "cuda"
    properties = torch.cuda.get_device_properties(setting.device) if on_gpu else None
    return {
        "device": properties.name if properties else "cpu, Triton's interpreter",
        "memory_bytes": properties.total_memory if properties else None,
        "l2_bytes": properties.L2_cache_size if properties else None,
        "multiprocessors": properties.multi_processor_count if properties else None,
        "capability": list(setting.capability) if on_gpu else None,
        "python": platform.python_version(),
        "packages": {name: package(name) for name in ("torch", "triton", "transformers", "flashinfer-python")},
        "cuda": torch.version.cuda,
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def measure(setting: Any, wanted: list[str], budget: float, keep: Callable[[list[Any]], None]) -> list[Any]:
    """All rows; `keep` is called after each section, so that what was measured outlives whatever comes next."""
    from gpu_measure import Clock, Row, State, measure_ceilings, one_line

    started = time.monotonic()
    ceilings, rows = measure_ceilings(setting)
    for row in rows:
        progress(row)
    pending = [name for name in WEIGHTS if name in wanted]
    while pending:
        name = pending[0]
        left = budget - (time.monotonic() - started)
        share = left * WEIGHTS[name] / sum(WEIGHTS[other] for other in pending)
        try:
            for row in section(name)(State(setting, ceilings, rows, Clock(share))):
                rows.append(row)
                progress(row)
        except Exception as error:
            rows.append(Row(name, "the section", failure=one_line(error)))
            progress(rows[-1])
        keep(rows)
        pending.pop(0)
    return rows


def as_json(row: Any) -> dict[str, Any]:
    """JSON has no infinity; the failure says what it was."""
    values = dataclasses.asdict(row)
    return {**values, "error": row.error if row.error is None or math.isfinite(row.error) else None}


def progress(row: Any) -> None:
    took = "" if row.seconds is None else f" {1e6 * row.seconds:.1f} µs"
    verdict = row.failure or "; ".join(row.notes)
    print(f"{row.section}: {row.case}{took} {verdict}".rstrip(), file=sys.stderr, flush=True)


def arguments(dry: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes under the interpreter, no GPU")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, one model")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--budget", type=float, help="seconds; what does not fit is listed as skipped")
    parser.add_argument("--seed", type=int, help="of all inputs; without, another one in every run")
    options = parser.parse_args()
    if dry and not options.dry_run:
        print("there is no GPU here: a dry run, whose times mean nothing", file=sys.stderr)
    options.dry_run = dry
    if options.budget is None:
        options.budget = QUICK_BUDGET_S if options.quick else BUDGET_S
    if options.seed is None:
        options.seed = int.from_bytes(os.urandom(4), "little")
    return options


def main() -> int:
    dry = prepare(sys.argv[1:])
    options = arguments(dry)
    from gpu_measure import Setting
    from gpu_report import table

    setting = Setting(
        device=torch.device("cpu" if dry else "cuda"),
        dtype=torch.float32 if dry else torch.bfloat16,
        capability=(8, 0) if dry else torch.cuda.get_device_capability(),
        dry=dry,
        quick=options.quick,
        seed=options.seed,
    )
    machine = describe(setting)
    out = options.out
    if out is None and not dry:
        slug = re.sub(r"[^a-z0-9]+", "_", machine["device"].lower()).strip("_")
        out = ROOT / "bench" / "results" / f"gpu_{slug}.json"
    started = time.monotonic()

    def keep(rows: list[Any]) -> None:
        content = {
            "measurement": "gpu",
            "command": " ".join(["bench/gpu.py", *sys.argv[1:]]),
            "dry_run": dry,
            "seed": options.seed,
            "seconds": time.monotonic() - started,
            "machine": machine,
            "rows": [as_json(row) for row in rows],
        }
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    rows = measure(setting, options.sections, options.budget, keep)
    keep(rows)
    print(table(rows, machine, dry=dry, seconds=time.monotonic() - started))
    return 1 if any(row.failure is not None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
