"""The report for people: the same tables on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from .load_compare import Comparison
from .load_report import LevelReport, Report, notes
from .load_stats import Stats
from .machine import machine_line

_LATENCIES = (
    ("TTFT", "ttft"), ("ITL", "itl"), ("longest gap", "longest_gap"), ("TPOT", "tpot"), ("E2E", "e2e"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    num_text_columns: int = 1
    """From the left; the others hold numbers, aligned to the right."""


def tables(report: Report) -> Iterator[Table]:
    """Those that have something to say."""
    if not report.levels:
        return
    yield _throughput(report)
    yield _latency(report)
    if report.settings.slo is not None:
        yield _goodput(report)
    if report.num_failed:
        yield _errors(report)
    for level in report.levels:
        if level.comparison:
            yield _comparison(level)
    yield _client(report)


def heading(report: Report) -> list[str]:
    """Who was measured, with what, from where."""
    settings, machine = report.settings, report.machine
    lines = []
    for index, server in enumerate(report.servers):
        version = f", {server.owned_by or 'server'} {server.version}" if server.version else ""
        name = report.name(index) or "server"
        lines.append(f"{name}: {server.url}, model {server.model}{version}")
        if server.cache_config:
            lines.append("   cache " + ", ".join(f"{key} {value}" for key, value in _shown_config(server.cache_config)))
    lengths = settings.input_tokens, settings.output_tokens
    spans = [str(one.low) if one.low == one.high else f"{one.low}-{one.high}" for one in lengths]
    prompt = "prompts from a file" if settings.prompts_path else f"{spans[0]} prompt tokens"
    shared = f", {settings.shared_prefix:.0%} of each shared" if settings.shared_prefix else ""
    streaming = "streamed" if settings.stream else "not streamed"
    lines.append(
        f"load: {settings.endpoint}, {streaming}, {prompt}{shared}, {spans[1]} output tokens, seed {settings.seed}"
    )
    lines.append(f"client: {machine_line(machine)}, Octavo {machine.octavo}")
    return lines


def _shown_config(config: dict[str, str]) -> list[tuple[str, str]]:
    names = ("block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching")
    return [(name, config[name]) for name in names if name in config]


def print_report(report: Report, console: Console) -> None:
    for line in heading(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for table in tables(report):
        console.print()
        console.print(_rich(table), soft_wrap=False)
    console.print()
    for note in notes(report):
        console.print(f"- {note}", markup=False, highlight=False, soft_wrap=True)


def as_markdown(report: Report) -> str:
    parts = ["# octavo bench serve", "", f"`{report.settings.command}`", "", report.created, ""]
    parts += [f"- {line.strip()}" for line in heading(report)]
    for table in tables(report):
        dashes = ["---" if index < table.num_text_columns else "---:" for index in range(len(table.columns))]
        rows = (table.columns, dashes, *table.rows)
        parts += ["", f"## {table.title}", ""]
        parts += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    parts += ["", "## Notes", "", *(f"- {note}" for note in notes(report))]
    return "\n".join(parts) + "\n"


def _rich(table: Table) -> RichTable:
    shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(table.columns):
        is_text = index < table.num_text_columns
        shown.add_column(column, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def _rows(report: Report) -> Iterator[tuple[str, Stats]]:
    for level in report.levels:
        for index, one in enumerate(level.servers):
            yield f"{level.level.label} {report.name(index)}".strip(), one


def _throughput(report: Report) -> Table:
    rows = []
    for label, one in _rows(report):
        total = "–" if one.total_tokens_per_s is None else f"{one.total_tokens_per_s:,.1f}"
        cached = "–" if one.cached_share is None else f"{one.cached_share:.0%}"
        failed = str(one.num_requests - one.num_ok)
        rows.append((
            label, str(one.num_requests), failed, f"{one.requests_per_s:.2f}", f"{one.output_tokens_per_s:,.1f}", total,
            cached, f"{one.wall_s:.1f}",
        ))  # fmt: skip
    columns = ("load", "requests", "failed", "requests/s", "output tok/s", "total tok/s", "cached", "wall s")
    return Table("Throughput", columns, rows)


def _latency(report: Report) -> Table:
    rows = []
    for label, one in _rows(report):
        for name, field in _LATENCIES:
            found = getattr(one, field)
            if found is not None:
                values = (found.mean, found.p50, found.p95, found.p99, found.max)
                rows.append((label, name, *map(milliseconds, values)))
                label = ""
    return Table("Latency (ms)", ("load", "", "mean", "p50", "p95", "p99", "max"), rows, 2)


def _goodput(report: Report) -> Table:
    slo = report.settings.slo
    limits = (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s), ("E2E", slo.e2e_s)) if slo else ()
    wanted = ", ".join(f"{name} ≤ {milliseconds(limit)} ms" for name, limit in limits if limit is not None)
    rows = [
        (label, f"{one.goodput.requests_per_s:.2f}", f"{one.goodput.share:.1%}")
        for label, one in _rows(report)
        if one.goodput is not None
    ]
    return Table(f"Goodput ({wanted})", ("load", "requests/s", "of all requests"), rows)


def _errors(report: Report) -> Table:
    rows = [
        (label, kind, one.error_examples.get(kind, ""), str(count))
        for label, one in _rows(report)
        for kind, count in one.errors.items()
    ]
    return Table("Errors", ("load", "kind", "the first said", "requests"), rows, 3)


def _comparison(level: LevelReport) -> Table:
    rows = []
    for one in level.comparison:
        is_time = " p" in one.metric
        shown = [milliseconds(value) if is_time else f"{value:,.2f}" for value in (one.first, one.second)]
        name = f"{one.metric} (ms)" if is_time else one.metric
        rows.append((name, *shown, verdict(one), _spread(one)))
    columns = ("", "A", "B", "A against B", "rounds")
    return Table(f"A against B, {level.level.label}", columns, rows)


def verdict(one: Comparison) -> str:
    """In words, so that nobody has to guess the direction."""
    ratio = one.speed_ratio
    words = f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"
    return words if one.is_clear else f"{words}, not clear"


def _spread(one: Comparison) -> str:
    if len(one.round_ratios) < 2:
        return "one only"
    return f"{min(one.round_ratios):.2f}–{max(one.round_ratios):.2f}"


def _client(report: Report) -> Table:
    rows = []
    for label, one in _rows(report):
        lag, late = one.client.loop_lag_p99_s, one.client.send_lag_max_s
        rows.append((
            label, f"{one.client.cpu_share:.1%}", "–" if lag is None else milliseconds(lag),
            "–" if late is None else milliseconds(late),
        ))  # fmt: skip
    columns = ("load", "CPU, of a core", "event loop late, p99 (ms)", "latest send (ms)")
    return Table("This client", columns, rows)


def milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"
