"""`octavo bench kv-cache`: what the K/V cache is worth, on the server's own engine."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
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
    from ..bench.kv_cache import PromptResult
    from ..bench.kv_cache_engine import BenchEngine
    from ..bench.kv_cache_measure import Settings
    from ..engine.messages import EngineReady
    from . import Subcommands


def add_parser(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "kv-cache",
        help="the same tokens with the K/V cache and with everything recomputed",
        description="Generates tokens after random prompts of several lengths, once with the K/V cache and once with "
        "the keys and values of the whole context computed again for every token, by the same engine; compares the "
        "tokens, and shows time, work and growth. Exit status 1 if tokens differ by more than rounding.",
    )
    parser.add_argument(
        "--prompt-tokens", metavar="N,N,…", default="16,128,512,1024", help="prompt lengths (default: 16,128,512,1024)"
    )
    parser.add_argument("--output-tokens", metavar="N", default="100", help="tokens to generate (default: 100)")
    parser.add_argument("--repeats", metavar="N", default="3", help="runs of each; the median counts (default: 3)")
    parser.add_argument("--seed", metavar="N", default="0", help="of the random prompts (default: 0)")
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    parser.add_argument("--png", metavar="FILE", help="draw it; needs matplotlib: pip install 'octavo[plot]'")
    add_engine_arguments(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True, slots=True)
class _Request:
    """The command line, checked."""

    settings: Settings
    engine: dict[str, Any]
    json_file: Path | None
    png_file: Path | None


def run(arguments: argparse.Namespace) -> int:
    """0; 1 if the tokens differ by more than rounding. Raises OptionError, ModelError."""
    return _run(_check(arguments))


def _run(request: _Request) -> int:
    from ..bench.kv_cache_engine import UncountedWork
    from ..bench.kv_cache_measure import measure
    from ..outputs import GenerationFailed

    engine, num_layers, model_name = _start(request)
    try:
        results = measure(engine, request.settings, lambda line: print(line, file=sys.stderr))
    except (GenerationFailed, UncountedWork) as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 1
    _report(request, engine.ready, results, num_layers, model_name)
    return 0 if all(parting.near_tie for result in results for parting in result.partings) else 1


def _report(
    request: _Request, ready: EngineReady, results: list[PromptResult], num_layers: int, model_name: str
) -> None:
    """The files, then the tables, so that a failure of one does not lose the other. Raises OptionError."""
    from ..bench.kv_cache_report import as_json, print_report
    from ..bench.machine import describe_machine, describe_torch, machine_line
    from ..console import report_console

    machine, setup = describe_machine(), describe_torch(ready.device)
    heading = (
        f"{machine_line(machine, setup)}\n"
        f"{model_name}, {ready.dtype}, {ready.backend} backend, {ready.weight_bytes / 2**20:.0f} MiB of weights"
    )
    content = {
        "measurement": "kv-cache",
        "model": model_name,
        "machine": dataclasses.asdict(machine),
        "torch": dataclasses.asdict(setup),
        "settings": dataclasses.asdict(request.settings),
        **as_json(results, ready, num_layers),
    }
    try:
        if request.json_file is not None:
            write_output_file(request.json_file, json.dumps(content, indent=1) + "\n")
        if request.png_file is not None:
            _draw(results, heading, request.png_file)
    finally:
        console = report_console()
        console.print(heading)
        print_report(console, results, num_layers)


def _draw(results: list[PromptResult], heading: str, path: Path) -> None:
    from ..bench.plot_kv_cache import save_plot

    try:
        save_plot(results, heading, path)
    except OSError as error:
        raise OptionError(f"cannot write {path}: {error.strerror}") from None


def _check(arguments: argparse.Namespace) -> _Request:
    from ..bench.kv_cache_measure import Settings

    png_file = parse_output_file(arguments.png, "--png")
    if png_file is not None and importlib.util.find_spec("matplotlib") is None:
        raise OptionError("--png needs matplotlib, which is not installed: pip install 'octavo[plot]'")
    settings = Settings(
        prompt_lengths=parse_numbers(arguments.prompt_tokens, "--prompt-tokens", 1),
        num_output=parse_number(arguments.output_tokens, "--output-tokens", 2),
        num_repeats=parse_number(arguments.repeats, "--repeats", 1),
        seed=parse_number(arguments.seed, "--seed", 0),
    )
    return _Request(settings, engine_values(arguments), parse_output_file(arguments.json, "--json"), png_file)


def _start(request: _Request) -> tuple[BenchEngine, int, str]:
    """The engine, its number of layers, and the model's name. One sequence's worth of pool, so that every run uses the
    same memory; a token budget that takes any context in one step, so that recomputing is not split."""
    from ...model.weights.open import read_spec
    from ...model.weights.resolve import resolve_model
    from ...scheduler.config import CacheConfig, SchedulerConfig
    from ..bench.kv_cache_engine import BenchEngine
    from ..config import EngineConfig

    files = resolve_model(request.engine["model"])
    spec = read_spec(str(files.path))
    settings = request.settings
    longest = max(settings.prompt_lengths) + settings.num_output
    if longest > spec.max_position_embeddings:
        raise OptionError(
            f"--prompt-tokens and --output-tokens add up to {longest}, but the model knows "
            f"{spec.max_position_embeddings} positions; give less"
        )
    engine = BenchEngine(
        EngineConfig(
            model=model_config(request.engine, str(files.path), max_model_len=longest),
            cache=CacheConfig(block_size=request.engine["block_size"], enable_prefix_caching=False),
            scheduler=SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=longest),
        )
    )
    if engine.ready.max_model_len < longest:
        raise OptionError(
            f"the free memory holds K/V of {engine.ready.max_model_len} tokens, and {longest} are needed; "
            "give smaller --prompt-tokens, or free some memory"
        )
    return engine, spec.num_hidden_layers, files.name
