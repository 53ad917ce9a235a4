"""What the K/V cache saves, as numbers: work counted exactly, times summed up, growth fitted. Plain Python.

Both ways produce token i (from 0) of a prompt of P tokens out of the same P + i tokens of context. With the cache, the
engine computes keys and values of the newest token and reads the rest; without, it computes them all.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

NEAR_TIE_GAPS = {"float32": 0.0, "float16": 2 * 2.0**-6, "bfloat16": 2 * 2.0**-3}
"""Two tokens are nearly tied if their logits are at most so far apart: two steps of the dtype at logits of 16 to 32,
the usual size of the largest ones. In float32 no difference is excused."""


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens whose keys and values one way computes, and takes from the pool, over a whole generation. Every layer does
    it, so vectors of K (and as many of V, per head) are these numbers times the number of layers."""

    num_computed: int
    num_reused: int


def cached_work(num_prompt: int, num_output: int) -> Work:
    """The prompt once, then each output token but the last, which nobody has to continue."""
    num_reused = (num_output - 1) * num_prompt + (num_output - 1) * (num_output - 2) // 2
    return Work(num_prompt + num_output - 1, num_reused)


def recompute_work(num_prompt: int, num_output: int) -> Work:
    """The whole context for every token."""
    return Work(num_output * num_prompt + num_output * (num_output - 1) // 2, 0)


@dataclass(frozen=True, slots=True)
class Run:
    """One generation, one way."""

    token_ids: list[int]
    token_seconds: list[float]
    """From the token before (or the start) to this token. [num_output]"""
    work: Work
    """`num_computed` is the engine's own count."""


@dataclass(frozen=True, slots=True)
class Parting:
    """A place where the two ways chose different tokens."""

    index: int
    """Of the output token."""
    cached_token: int
    recomputed_token: int
    gap: float | None
    """How far apart the two tokens' log probabilities are, the larger of the two ways. None: too far to be listed."""
    near_tie: bool


@dataclass(frozen=True, slots=True)
class Growth:
    """How much one more token costs near the start and near the end of a generation."""

    first_quarter_seconds: float
    last_quarter_seconds: float


@dataclass(frozen=True, slots=True)
class CostFit:
    """Least squares of `seconds per token = base + slope × tokens of context`.

    n tokens from an empty context then cost base × n + slope × n² / 2.
    """

    base_seconds: float
    slope_seconds: float
    r_squared: float

    @property
    def quadratic_from_tokens(self) -> float | None:
        """From so many tokens on, the quadratic part of their total cost outweighs the linear one; None: never."""
        if self.slope_seconds <= 0:
            return None
        return max(0.0, 2 * self.base_seconds / self.slope_seconds)


@dataclass(frozen=True, slots=True)
class PromptResult:
    """Both ways for one prompt length."""

    num_prompt: int
    cached: list[Run]
    """One per repeat."""
    recomputed: list[Run]
    partings: list[Parting]

    @property
    def num_output(self) -> int:
        return len(self.cached[0].token_ids)

    @property
    def num_agreeing(self) -> int:
        return self.num_output - len({parting.index for parting in self.partings})

    @property
    def ratio(self) -> float:
        return median_total(self.recomputed) / median_total(self.cached)


def median_total(runs: Sequence[Run]) -> float:
    """Seconds of a whole generation."""
    return statistics.median(sum(run.token_seconds) for run in runs)


def median_curve(runs: Sequence[Run]) -> list[float]:
    """Seconds of each token, the median over the repeats. [num_output]"""
    return [statistics.median(seconds) for seconds in zip(*(run.token_seconds for run in runs), strict=True)]


def growth(token_seconds: Sequence[float]) -> Growth:
    """The first token is left out: with the cache it is the whole prompt's."""
    further = token_seconds[1:]
    quarter = max(1, len(further) // 4)
    return Growth(statistics.median(further[:quarter]), statistics.median(further[-quarter:]))


def fit_cost(contexts: Sequence[float], seconds: Sequence[float]) -> CostFit | None:
    """None without at least three points at two different contexts."""
    if len(contexts) < 3 or len(set(contexts)) < 2:
        return None
    slope, base = statistics.linear_regression(contexts, seconds)
    mean = statistics.fmean(seconds)
    total = sum((y - mean) ** 2 for y in seconds)
    rest = sum((y - base - slope * x) ** 2 for x, y in zip(contexts, seconds, strict=True))
    return CostFit(base, slope, 1.0 - rest / total if total > 0 else 1.0)


def fit_results(results: Sequence[PromptResult]) -> tuple[CostFit | None, CostFit | None]:
    """Cost per token against context over all prompt lengths, (with the cache, without). First tokens are left out:
    with the cache they are prompts."""
    fits = []
    for cached in (True, False):
        contexts: list[float] = []
        seconds: list[float] = []
        for result in results:
            curve = median_curve(result.cached if cached else result.recomputed)
            contexts += [result.num_prompt + index for index in range(1, len(curve))]
            seconds += curve[1:]
        fits.append(fit_cost(contexts, seconds))
    return fits[0], fits[1]
