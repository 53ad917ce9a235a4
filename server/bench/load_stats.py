"""Numbers from records: pure functions of timestamps and counts.

Latencies count from when a request was due, so one that had to wait for its turn is not reported as fast. Percentiles
interpolate linearly between the two nearest values (the rule that numpy and spreadsheets use by default).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .load_client import Record
from .load_settings import Slo


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of times, in seconds."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution | None:
        """None of nothing."""
        ordered = sorted(values)
        if not ordered:
            return None
        p50, p95, p99 = (percentile(ordered, share) for share in (0.5, 0.95, 0.99))
        return cls(len(ordered), statistics.fmean(ordered), p50, p95, p99, ordered[-1])


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of ascending, non-empty values lie."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def ttft_s(record: Record) -> float | None:
    """From when the request was due to its first token."""
    return record.arrivals[0][0] - record.intended_s if record.arrivals else None


def e2e_s(record: Record) -> float:
    return record.end_s - record.intended_s


def tpot_s(record: Record) -> float | None:
    """Mean time of each token after the first: (E2E − TTFT) / (tokens − 1)."""
    first = ttft_s(record)
    return None if first is None or record.output_tokens < 2 else (e2e_s(record) - first) / (record.output_tokens - 1)


def inter_token_s(record: Record) -> list[float]:
    """One value per item after the first arrival: the gap before its arrival, shared with those that came along."""
    gaps: list[float] = []
    for (before_s, _), (now_s, num_items) in itertools.pairwise(record.arrivals):
        gaps += [(now_s - before_s) / num_items] * num_items
    return gaps


def longest_gap_s(record: Record) -> float | None:
    """The longest silence after the first token, undivided."""
    times = [time_s for time_s, _ in record.arrivals]
    return max((now - before for before, now in itertools.pairwise(times)), default=None)


def meets(record: Record, slo: Slo) -> bool:
    """A request without a second token has no TPOT to miss; a failed one meets nothing."""
    limits = ((ttft_s(record), slo.ttft_s), (tpot_s(record), slo.tpot_s), (e2e_s(record), slo.e2e_s))
    return record.ok and all(value is None or limit is None or value <= limit for value, limit in limits)


@dataclass(slots=True)
class Round:
    """What one server did in one stretch of time."""

    start_s: float
    end_s: float = 0.0
    records: list[Record] = field(default_factory=list)
    num_cancelled: int = 0
    """In flight when the run was interrupted; in no other number."""
    client_cpu_s: float = 0.0
    loop_lags_s: list[float] = field(default_factory=list)
    """How late this client's own event loop was, sampled all the time."""
    send_lags_s: list[float] = field(default_factory=list)
    """Open loop: how late each request was, when it was handed to the network or began to wait for a free slot."""

    @property
    def wall_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens per request, planned against counted by the server."""

    planned_mean: float | None
    mean: float | None
    exact: bool | None
    """Every request was as long as planned; None: not known."""


@dataclass(frozen=True, slots=True)
class Goodput:
    requests_per_s: float
    share: float
    """Of all requests, failed ones included."""


@dataclass(frozen=True, slots=True)
class ClientLoad:
    """Whether the measuring instrument itself was the limit."""

    cpu_share: float
    """Of one core."""
    loop_lag_p99_s: float | None
    send_lag_max_s: float | None
    """Open loop: of the latest request."""


@dataclass(frozen=True, slots=True)
class Stats:
    """One server at one level."""

    num_requests: int
    num_ok: int
    errors: dict[str, int]
    error_examples: dict[str, str]
    num_cancelled: int
    wall_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float | None
    """Prompt and output; None where the server does not count prompts."""
    cached_share: float | None
    """Of prompt tokens, those that the server found in its cache."""
    input: Lengths
    output: Lengths
    tokens_per_chunk: float | None
    ttft: Distribution | None
    itl: Distribution | None
    longest_gap: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None
    goodput: Goodput | None
    client: ClientLoad


def stats(rounds: Sequence[Round], slo: Slo | None) -> Stats:
    """All rounds of a server at a level taken together."""
    records = [record for round_ in rounds for record in round_.records]
    good = [record for record in records if record.ok]
    wall_s = sum(round_.wall_s for round_ in rounds)
    prompts = [record.usage.prompt_tokens for record in good if record.usage.prompt_tokens is not None]
    cached = [record.usage.cached_tokens for record in good if record.usage.cached_tokens is not None]
    num_output = sum(record.output_tokens for record in good)
    num_chunks = sum(record.num_chunks for record in good)
    failed = [record for record in records if record.error_kind is not None]
    errors = Counter(record.error_kind or "" for record in failed)
    knows_prompts = len(prompts) == len(good) > 0

    def per_s(count: float) -> float:
        return count / wall_s if wall_s > 0 else 0.0

    return Stats(
        num_requests=len(records),
        num_ok=len(good),
        errors=dict(errors.most_common()),
        error_examples={record.error_kind or "": record.error_message for record in reversed(failed)},
        num_cancelled=sum(round_.num_cancelled for round_ in rounds),
        wall_s=wall_s,
        requests_per_s=per_s(len(good)),
        output_tokens_per_s=per_s(num_output),
        total_tokens_per_s=per_s(sum(prompts) + num_output) if knows_prompts else None,
        cached_share=sum(cached) / sum(prompts) if cached and sum(prompts) else None,
        input=_lengths([(record.planned_input, record.usage.prompt_tokens) for record in good]),
        output=_lengths([(record.max_tokens, record.usage.output_tokens) for record in good]),
        tokens_per_chunk=num_output / num_chunks if num_chunks else None,
        ttft=Distribution.of(_known(map(ttft_s, good))),
        itl=Distribution.of(gap for record in good for gap in inter_token_s(record)),
        longest_gap=Distribution.of(_known(map(longest_gap_s, good))),
        tpot=Distribution.of(_known(map(tpot_s, good))),
        e2e=Distribution.of(map(e2e_s, good)),
        goodput=None if slo is None else _goodput(records, slo, wall_s),
        client=_client_load(rounds, wall_s),
    )


def _known(values: Iterable[float | None]) -> Iterable[float]:
    return (value for value in values if value is not None)


def _goodput(records: Sequence[Record], slo: Slo, wall_s: float) -> Goodput:
    num_good = sum(meets(record, slo) for record in records)
    return Goodput(num_good / wall_s if wall_s > 0 else 0.0, num_good / len(records) if records else 0.0)


def _lengths(pairs: Sequence[tuple[int | None, int | None]]) -> Lengths:
    """`pairs` of (planned, counted)."""
    planned = [plan for plan, _ in pairs if plan is not None]
    counted = [count for _, count in pairs if count is not None]
    known = len(planned) == len(counted) == len(pairs) > 0
    return Lengths(
        planned_mean=statistics.fmean(planned) if planned else None,
        mean=statistics.fmean(counted) if counted else None,
        exact=all(plan == count for plan, count in pairs) if known else None,
    )


def _client_load(rounds: Sequence[Round], wall_s: float) -> ClientLoad:
    lags = Distribution.of(lag for round_ in rounds for lag in round_.loop_lags_s)
    return ClientLoad(
        cpu_share=sum(round_.client_cpu_s for round_ in rounds) / wall_s if wall_s > 0 else 0.0,
        loop_lag_p99_s=lags.p99 if lags else None,
        send_lag_max_s=max((lag for round_ in rounds for lag in round_.send_lags_s), default=None),
    )
