"""Two servers against each other: how many times as fast the first one is, and how much that varies over the rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .load_stats import Distribution, Stats


@dataclass(frozen=True, slots=True)
class Metric:
    """One that is worth comparing; `part` of a distribution, or the number itself."""

    name: str
    field: str
    part: str | None = None

    @property
    def higher_is_better(self) -> bool:
        return self.part is None

    def of(self, stats: Stats) -> float | None:
        value = getattr(stats, self.field)
        if isinstance(value, Distribution):
            value = getattr(value, self.part or "mean")
        return value if isinstance(value, int | float) else None


METRICS = (
    Metric("requests/s", "requests_per_s"),
    Metric("output tokens/s", "output_tokens_per_s"),
    *(Metric(f"{name} {part}", field, part)
      for name, field in (("TTFT", "ttft"), ("ITL", "itl"), ("TPOT", "tpot"), ("E2E", "e2e"))
      for part in ("p50", "p99")),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of one metric. A `speed_ratio` above 1 says that the first server is faster, whichever way the metric runs."""

    metric: str
    first: float
    second: float
    speed_ratio: float
    """From all rounds taken together."""
    round_ratios: tuple[float, ...]
    """Each round's, in order; a round is one stretch of each server, right after each other."""

    @property
    def is_clear(self) -> bool:
        """Whether every round of several says the same. One round alone says nothing of how much it varies."""
        ratios = self.round_ratios
        return len(ratios) > 1 and (min(ratios) > 1 or max(ratios) < 1)

    @property
    def median_round_ratio(self) -> float | None:
        return statistics.median(self.round_ratios) if self.round_ratios else None


def speed_ratio(metric: Metric, first: Stats, second: Stats) -> float | None:
    """How many times as fast the first is; None where either has no such number."""
    one, other = metric.of(first), metric.of(second)
    if not one or not other:
        return None
    return one / other if metric.higher_is_better else other / one


def compare(first: Stats, second: Stats, rounds: Sequence[tuple[Stats, Stats]]) -> list[Comparison]:
    """Every metric that both servers have."""
    comparisons = []
    for metric in METRICS:
        ratio = speed_ratio(metric, first, second)
        one, other = metric.of(first), metric.of(second)
        if ratio is None or one is None or other is None:
            continue
        ratios = [speed_ratio(metric, *pair) for pair in rounds]
        known = tuple(ratio for ratio in ratios if ratio is not None)
        comparisons.append(Comparison(metric.name, one, other, ratio, known))
    return comparisons
