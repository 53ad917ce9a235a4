"""`octavo bench serve`: how fast any OpenAI-compatible server answers, and under how much load."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..client_address import DEFAULT_BASE_URL
from ..exit_status import INTERRUPTED

if TYPE_CHECKING:
    from ..bench.load_report import Report
    from ..bench.load_settings import Settings
    from . import Subcommands

_FLAGS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "server",
        "",
        (
            ("base-url", "URL", f"server to measure, with or without /v1 (default: {DEFAULT_BASE_URL})"),
            ("compare", "URL", "a second server: both get the same load in turns, and their ratios are printed"),
            ("endpoint", "WHICH", "completions | chat (default: completions)"),
            ("model", "NAME", "default: the first that the server lists"),
            ("api-key", "KEY", "default: $OCTAVO_API_KEY, else $OPENAI_API_KEY; never printed or stored"),
            ("compare-api-key", "KEY", "for --compare; the other key is never sent there"),
        ),
    ),
    (
        "load",
        "every level of --concurrency and of --rate is measured for itself",
        (
            ("concurrency", "N,N,…", "closed loop: so many requests open all the time (default: 1,8,32)"),
            ("rate", "R,R,…", "open loop: so many requests a second on average, as a Poisson process"),
            ("max-concurrency", "N", "open loop: arrivals beyond so many open requests wait, which counts as latency"),
            ("num-requests", "N", "in each round of a level (default: 4 × concurrency, 8 at least; 50 for a rate)"),
            ("duration", "TIME", "begin requests for so long in each round, and wait for those under way"),
            ("rounds", "N", "times that each level is repeated (default: 1; with --compare 4)"),
            ("warmup", "N", "requests before anything is measured (default: 2)"),
            ("timeout", "TIME", "for one whole answer (default: 600)"),
        ),
    ),
    (
        "requests",
        "",
        (
            ("input-tokens", "N|A-B", "length of prompts; a range is drawn from uniformly (default: 128)"),
            ("output-tokens", "N|A-B", "tokens to generate (default: 128)"),
            ("prompts", "FILE", 'JSON lines with "prompt" or "messages" and maybe "max_tokens"; or text, one a line'),
            ("shared-prefix", "SHARE", "of each prompt, the same in all requests of a round (default: 0)"),
            ("temperature", "T", "default: 0"),
            ("seed", "N", "of prompts, lengths and arrivals (default: a new one each time, which is reported)"),
        ),
    ),
    (
        "results",
        "",
        (
            ("slo", "LIMITS", "such as ttft=0.5,tpot=50ms,e2e=10: report how many requests meet all of them"),
            ("output", "FILE", "write everything as JSON (-: to standard output)"),
            ("markdown", "FILE", "write the tables as Markdown (-: to standard output)"),
        ),
    ),
)
_SWITCHES = (
    ("requests", "no-ignore-eos", "let the model end early; else outputs have their full length"),
    ("requests", "no-stream", "ask for whole answers; only E2E is measured then"),
    ("results", "fail-on-error", "exit with status 1 if any request failed, not only if all did"),
)


def add_parser(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "serve",
        help="load a server, any OpenAI-compatible one, and report throughput and latencies",
        description="Loads any OpenAI-compatible server and reports throughput, latencies, goodput and errors. "
        "Ctrl-C ends the run and reports what was measured until then.",
        argument_default=argparse.SUPPRESS,
    )
    groups = {}
    for name, description, flags in _FLAGS:
        groups[name] = parser.add_argument_group(name, description or None)
        for flag, metavar, text in flags:
            groups[name].add_argument(f"--{flag}", metavar=metavar, help=text)
    for name, flag, text in _SWITCHES:
        groups[name].add_argument(f"--{flag}", action="store_true", help=text)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    import asyncio

    from ..bench.load_probe import ServerUnusable
    from ..bench.load_settings import read_settings
    from ..bench.output_files import parse_output_file

    settings = read_settings({name: value for name, value in vars(arguments).items() if name != "run"})
    for path, flag in ((settings.output_path, "--output"), (settings.markdown_path, "--markdown")):
        if path != "-":
            parse_output_file(path, flag)

    try:
        report = asyncio.run(_measure(settings))
    except ServerUnusable as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 1
    _publish(report)
    if not report.complete:
        return INTERRUPTED
    all_failed = report.num_failed == report.num_requests
    return 1 if all_failed or (settings.fail_on_error and report.num_failed) else 0


async def _measure(settings: Settings) -> Report:
    """The whole run. Ctrl-C cancels it: what has been measured by then is the result, if anything was begun."""
    import asyncio

    from rich.console import Console

    from ..bench.load_client import open_session
    from ..bench.load_probe import get_to_know_all
    from ..bench.load_progress import ProgressDisplay
    from ..bench.load_report import make_report
    from ..bench.load_run import Run
    from ..bench.load_workload import read_prompts

    prompts = []
    if settings.prompts_path is not None:
        prompts = read_prompts(settings.prompts_path, chat=settings.endpoint == "chat")
    async with open_session() as session:
        targets = await get_to_know_all(settings, session)
        with ProgressDisplay(Console(stderr=True)) as progress:
            run = Run(settings, targets, progress, prompts)
            complete = True
            try:
                await run.run()
            except asyncio.CancelledError:
                if not run.results:
                    raise
                complete = False
    return make_report(settings, [target.facts for target in targets], run.results, complete=complete)


def _publish(report: Report) -> None:
    """The files, then the tables, so that a failure of one does not lose the other. Tables go to standard output,
    unless a file of results goes there. Raises OptionError."""
    import json

    from ..bench.load_report import as_json
    from ..bench.load_tables import as_markdown, print_report
    from ..console import report_console

    settings = report.settings
    try:
        if settings.output_path is not None:
            _write(settings.output_path, json.dumps(as_json(report), indent=2, ensure_ascii=False) + "\n")
        if settings.markdown_path is not None:
            _write(settings.markdown_path, as_markdown(report))
    finally:
        print_report(report, report_console(stderr=settings.reports_to_standard_output))


def _write(path: str, text: str) -> None:
    from ..bench.output_files import write_output_file

    if path == "-":
        sys.stdout.write(text)
    else:
        write_output_file(Path(path), text)
