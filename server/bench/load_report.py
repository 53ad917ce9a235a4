"""What a run has found: one structure, and the JSON file made of it."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .load_compare import Comparison, compare
from .load_probe import ServerFacts
from .load_run import LevelResult
from .load_settings import ClosedLoop, Level, Settings
from .load_stats import Stats, stats
from .machine import Machine, describe_machine

SCHEMA = "octavo-bench-serve"
SCHEMA_VERSION = 1
LATE_CLIENT_S = 0.01
BUSY_CLIENT_SHARE = 0.8
UNPLANNED_CACHE_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class LevelReport:
    level: Level
    servers: tuple[Stats, ...]
    rounds: tuple[tuple[Stats, ...], ...]
    """Of each server."""
    comparison: tuple[Comparison, ...]


@dataclass(frozen=True, slots=True)
class Report:
    settings: Settings
    servers: tuple[ServerFacts, ...]
    levels: tuple[LevelReport, ...]
    machine: Machine
    """The one that this client ran on; the server's may be another."""
    created: str
    """ISO 8601, UTC."""
    complete: bool
    """Not interrupted."""

    @property
    def num_requests(self) -> int:
        return sum(one.num_requests for level in self.levels for one in level.servers)

    @property
    def num_failed(self) -> int:
        return sum(one.num_requests - one.num_ok for level in self.levels for one in level.servers)

    def name(self, server: int) -> str:
        """How the report calls a server: nothing if there is but one."""
        return "AB"[server] if len(self.servers) > 1 else ""


def make_report(
    settings: Settings, servers: Sequence[ServerFacts], results: Sequence[LevelResult], *, complete: bool
) -> Report:
    """Levels that never began are left out."""
    levels = tuple(_level(settings, result) for result in results if any(result.rounds))
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Report(settings, tuple(servers), levels, describe_machine(), created, complete)


def _level(settings: Settings, result: LevelResult) -> LevelReport:
    servers = tuple(stats(rounds, settings.slo) for rounds in result.rounds)
    rounds = tuple(tuple(stats([round_], settings.slo) for round_ in rounds) for rounds in result.rounds)
    comparison: tuple[Comparison, ...] = ()
    if len(servers) == 2:
        complete = list(zip(*rounds, strict=False))[: result.num_complete_rounds]
        comparison = tuple(compare(*servers, complete))
    return LevelReport(result.level, servers, rounds, comparison)


def as_json(report: Report) -> dict[str, Any]:
    """The file's content, which docs/benchmarks-serving.md describes: times in seconds, and no secrets."""
    settings = report.settings
    return {
        "schema": SCHEMA,
        "version": SCHEMA_VERSION,
        "created": report.created,
        "complete": report.complete,
        "command": settings.command,
        "client": dataclasses.asdict(report.machine),
        "workload": _workload(settings),
        "servers": [dataclasses.asdict(server) for server in report.servers],
        "levels": [_level_json(report, level) for level in report.levels],
        "notes": notes(report),
    }


def _workload(settings: Settings) -> dict[str, Any]:
    from_file = settings.prompts_path is not None
    return {
        "endpoint": settings.endpoint,
        "stream": settings.stream,
        "seed": settings.seed,
        "rounds": settings.rounds,
        "duration_s": settings.duration_s,
        "input_tokens": None if from_file else dataclasses.asdict(settings.input_tokens),
        "output_tokens": dataclasses.asdict(settings.output_tokens),
        "prompts_from_file": from_file,
        "shared_prefix": None if from_file else settings.shared_prefix,
        "temperature": settings.temperature,
        "ignore_eos": settings.ignore_eos,
        "warmup_requests": settings.num_warmup,
        "timeout_s": settings.timeout_s,
        "slo": None if settings.slo is None else dataclasses.asdict(settings.slo),
    }


def _level_json(report: Report, level: LevelReport) -> dict[str, Any]:
    kind = "closed" if isinstance(level.level, ClosedLoop) else "open"
    return {
        "load": {"kind": kind, **dataclasses.asdict(level.level)},
        "servers": [
            dataclasses.asdict(one) | {"rounds": [_round_json(round_) for round_ in rounds]}
            for one, rounds in zip(level.servers, level.rounds, strict=True)
        ],
        "comparison": [
            dataclasses.asdict(one) | {"clear": one.is_clear, "median_round_ratio": one.median_round_ratio}
            for one in level.comparison
        ],
    }


def _round_json(stats_: Stats) -> dict[str, Any]:
    """The few numbers that show how much rounds differ."""
    medians = {
        name + "_p50_s": None if found is None else found.p50
        for name, found in (("ttft", stats_.ttft), ("itl", stats_.itl), ("tpot", stats_.tpot), ("e2e", stats_.e2e))
    }
    return {
        "num_ok": stats_.num_ok,
        "wall_s": stats_.wall_s,
        "requests_per_s": stats_.requests_per_s,
        "output_tokens_per_s": stats_.output_tokens_per_s,
        **medians,
    }


def notes(report: Report) -> list[str]:
    """What a reader has to know to trust the numbers, or not to."""
    lines = [] if report.complete else ["interrupted: only what had ended by then is in these numbers"]
    if not report.num_requests:
        lines.append("no request was sent")
    for index, server in enumerate(report.servers):
        name = f"{report.name(index)}: " if report.name(index) else ""
        measured = [level.servers[index] for level in report.levels]
        lines += [name + note for note in (*server.notes, *_how_counted(report, server, measured))]
        lines += [
            name + note for level in report.levels for note in _warnings(report, level.level, level.servers[index])
        ]
    return lines


def _how_counted(report: Report, server: ServerFacts, measured: Sequence[Stats]) -> list[str]:
    lines = [f"prompts sent as {server.prompts_as}; prompt lengths {_exactness([one.input for one in measured])}"]
    if report.settings.prompts_path is not None:
        lines = ["prompts from a file"]
    lines.append(f"output lengths {_exactness([one.output for one in measured])}")
    if not report.settings.stream:
        return [*lines, "without streaming there is no TTFT, ITL or TPOT"]
    if server.counts_tokens_per_chunk:
        return [*lines, "ITL per token: every chunk says how many tokens there are so far"]
    sizes = [one.tokens_per_chunk for one in measured if one.tokens_per_chunk]
    per_chunk = f", {sum(sizes) / len(sizes):.2f} tokens each on average" if sizes and server.sends_usage else ""
    return [*lines, f"ITL per chunk, not per token: chunks do not say how many tokens they hold{per_chunk}"]


def _exactness(lengths: Sequence[Any]) -> str:
    known = [one for one in lengths if one.exact is not None]
    if not known:
        return "not known"
    if all(one.exact for one in known):
        return "exactly as planned, by the server's count"
    off = ", ".join(f"{one.mean:.1f} for {one.planned_mean:.1f}" for one in known if not one.exact)
    return f"not as planned: on average {off} tokens"


def _warnings(report: Report, level: Level, measured: Stats) -> list[str]:
    lines = []
    planned = report.settings.shared_prefix + UNPLANNED_CACHE_SHARE
    if report.settings.prompts_path is None and (measured.cached_share or 0) > planned:
        lines.append(
            f"{level.label}: {measured.cached_share:.0%} of prompt tokens came from the server's cache, more than they "
            "share by plan: it has seen them before (run with another --seed), or they share a chat template"
        )
    client = measured.client
    if (client.loop_lag_p99_s or 0) > LATE_CLIENT_S or client.cpu_share > BUSY_CLIENT_SHARE:
        lines.append(
            f"{level.label}: this client was late itself, by up to {1e3 * (client.loop_lag_p99_s or 0):.0f} ms at p99, "
            f"with {client.cpu_share:.0%} of a core: so uncertain are the latencies; give it a core of its own"
        )
    if measured.num_cancelled:
        lines.append(f"{level.label}: {measured.num_cancelled} requests were under way when it was interrupted")
    return lines
