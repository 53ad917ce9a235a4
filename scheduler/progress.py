"""What the scheduler reports after a step."""

from __future__ import annotations

from dataclasses import dataclass

from .batch import TokenLogprobs
from .request import Request
from .stop import Stop


@dataclass(slots=True, frozen=True)
class Progress:
    """New tokens of one sample, and whether they ended it."""

    request: Request
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    stop: Stop | None


@dataclass(slots=True)
class SchedulerCounters:
    """Running totals since the start; the engine reports their increase."""

    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    """Computed before, lost by a preemption, computed again."""
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    prefix_cache_queries: int = 0
    """In tokens, first admissions only."""
    prefix_cache_hits: int = 0
