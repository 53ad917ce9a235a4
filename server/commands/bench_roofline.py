"""`octavo bench roofline`: how near each step comes to what the machine can do."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bench.engine_arguments import (
    add_engine_arguments,
    engine_values,
    model_config,
    parse_number,
    parse_numbers,
)
from ..bench.output_files import parse_output_file, write_output_file
from ..options import OptionError

if TYPE_CHECKING:
    from ...model.spec import ModelSpec
    from ..bench.ceilings import Ceilings
    from ..bench.roofline import ModelCost, StepShape
    from ..bench.roofline_report import StepResult
    from ..bench.roofline_steps import StepBench
    from . import Subcommands


def add_parser(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "roofline",
        help="bytes and FLOPs of a step against this machine's bandwidth and matmul rate",
        description="Measures the machine's read bandwidth and matrix multiplication rate, counts the bytes and FLOPs "
        "of decode steps and prefill chunks, and compares the shortest possible time with the measured one.",
    )
    parser.add_argument("--batch", metavar="N,N,…", default="1,8,32", help="sequences of a decode (default: 1,8,32)")
    parser.add_argument(
        "--context", metavar="N,N,…", default="128,1024", help="tokens each has in the pool (default: 128,1024)"
    )
    parser.add_argument(
        "--prefill",
        metavar="N,N,…",
        default="128,512",
        help="prompt chunks, each run after no context and after the longest --context (default: 128,512)",
    )
    parser.add_argument(
        "--repeats", metavar="N", default="10", help="runs of each step; the median counts (default: 10)"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    add_engine_arguments(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True, slots=True)
class _Request:
    """The command line, checked."""

    shapes: list[StepShape]
    num_repeats: int
    engine: dict[str, Any]
    json_file: Path | None


def run(arguments: argparse.Namespace) -> int:
    """0: a slow step is a result like any other. Raises OptionError, ModelError."""
    _run(_check(arguments))
    return 0


def _run(request: _Request) -> None:
    from ...model.registry import model_family
    from ...model.weights.open import read_spec
    from ...model.weights.resolve import resolve_model
    from ..bench.ceilings import measure_ceilings
    from ..bench.roofline import model_cost
    from ..bench.roofline_steps import StepBench

    files = resolve_model(request.engine["model"])
    spec = read_spec(str(files.path))
    _check_positions(request.shapes, spec)
    bench = StepBench(model_config(request.engine, str(files.path)), request.engine["block_size"], request.shapes)
    backend = bench.runner.backend
    print("measuring the machine", file=sys.stderr)
    ceilings = measure_ceilings(backend.device, backend.dtype, spec)
    parameters = [
        (name, shape, backend.weight_bytes([stored]))
        for (name, shape), stored in zip(
            model_family(spec.architecture).parameters(spec), bench.runner.weights, strict=True
        )
    ]
    cost = model_cost(spec, parameters, backend.dtype.itemsize)
    results = _measure(bench, cost, ceilings, request.num_repeats)
    _report(request, files.name, bench, cost, ceilings, results)


def _check(arguments: argparse.Namespace) -> _Request:
    from ..bench.roofline import StepShape

    batches = parse_numbers(arguments.batch, "--batch", 1, 65536)
    contexts = parse_numbers(arguments.context, "--context", 1)
    chunks = parse_numbers(arguments.prefill, "--prefill", 2)
    shapes = [StepShape(batch, context, 1) for batch in batches for context in contexts]
    shapes += [StepShape(1, context, chunk) for chunk in chunks for context in (0, max(contexts))]
    return _Request(
        shapes,
        parse_number(arguments.repeats, "--repeats", 1, 10**6),
        engine_values(arguments),
        parse_output_file(arguments.json, "--json"),
    )


def _check_positions(shapes: list[StepShape], spec: ModelSpec) -> None:
    longest = max(shape.num_context + shape.num_new for shape in shapes)
    if longest > spec.max_position_embeddings:
        raise OptionError(
            f"--context and --prefill add up to {longest} tokens, but the model knows {spec.max_position_embeddings} "
            "positions; give less"
        )


def _measure(bench: StepBench, cost: ModelCost, ceilings: Ceilings, num_repeats: int) -> list[StepResult]:
    from ..bench.roofline import floor, step_cost
    from ..bench.roofline_report import StepResult, describe

    results = []
    for shape in bench.fitting:
        print(describe(shape), file=sys.stderr)
        step = step_cost(cost, shape)
        limit = floor(step, ceilings.bytes_per_second, ceilings.flops_per_second)
        results.append(StepResult(shape, step, limit, bench.measure(shape, num_repeats)))
    return results


def _report(
    request: _Request,
    model_name: str,
    bench: StepBench,
    cost: ModelCost,
    ceilings: Ceilings,
    results: list[StepResult],
) -> None:
    """The file, then the tables, so that a failure of one does not lose the other. Raises OptionError."""
    from ..bench.machine import describe_machine, describe_torch, machine_line
    from ..bench.roofline_report import as_json, print_ceilings, print_steps
    from ..console import report_console

    backend = bench.runner.backend
    dtype = str(backend.dtype).removeprefix("torch.")
    machine, setup = describe_machine(), describe_torch(str(backend.device))
    skipped = [(shape, bench.pool_bytes(shape)) for shape in request.shapes if shape not in bench.fitting]
    content = {
        "measurement": "roofline",
        "model": model_name,
        "dtype": dtype,
        "backend": backend.name,
        "block_size": bench.runner.block_size,
        "machine": dataclasses.asdict(machine),
        "torch": dataclasses.asdict(setup),
        **as_json(cost, ceilings, results, skipped),
    }
    try:
        if request.json_file is not None:
            write_output_file(request.json_file, json.dumps(content, indent=1) + "\n")
    finally:
        console = report_console()
        console.print(machine_line(machine, setup))
        console.print(
            f"{model_name}, {dtype}, {bench.runner.backend_label} backend: "
            f"{cost.weight_bytes / 1e6:.1f} MB of weights per step, "
            f"{cost.kv_bytes_per_token / 1024:.1f} KiB of K/V per token"
        )
        print_ceilings(console, ceilings, dtype)
        print_steps(console, results, skipped)
