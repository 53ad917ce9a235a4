"""A histogram for one thread: prometheus_client's own takes a lock and a linear search per observation."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence


class Histogram:
    """Observations sorted into buckets by their upper bounds, which are inclusive, and their sum."""

    __slots__ = ("_bounds", "_counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` ascend; beyond the last there is one bucket more."""
        self._bounds = tuple(float(bound) for bound in bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count `count` observations of the same value at once: tokens arrive several per wake-up."""
        self._counts[bisect_left(self._bounds, value)] += count
        self.sum += value * count

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """Each bound, infinity last, with the number of observations up to it."""
        total = 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            yield bound, total


def one_two_five(limit: int) -> tuple[int, ...]:
    """Bounds 1, 2, 5, 10, 20, 50 … up to `limit`."""
    values: list[int] = []
    power = 1
    while power <= limit:
        values += [factor * power for factor in (1, 2, 5) if factor * power <= limit]
        power *= 10
    return tuple(values) or (1,)
