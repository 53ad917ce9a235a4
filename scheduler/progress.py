"""What the scheduler reports after a step."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import msgspec

from ..block_manager.manager import PrefixMisses
from .batch import TokenLogprobs
from .request import Request
from .stop import Stop


class Progress(msgspec.Struct, frozen=True, eq=False, gc=False):
    """New tokens of one sample, and whether they ended it."""

    request: Request
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    stop: Stop | None
    is_first: bool
    """Whether they are the first of this sample."""


class SchedulerCounters(msgspec.Struct):
    """Running totals since the start; the engine reports their increase."""

    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    """Computed before, lost by a preemption, computed again."""
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    prefix_cache_queries: int = 0
    """In tokens, first admissions only."""
    prefix_cache_hits: int = 0
    """These and the three kinds of misses add up to the queries; see PrefixMisses for what each means."""
    prefix_misses_new: int = 0
    prefix_misses_evicted: int = 0
    prefix_misses_tail: int = 0

    def count_computed(self, request: Request, before: int, after: int) -> None:
        """Tokens [before, after) of a request have been computed."""
        high_water = request.high_water_tokens
        if before < high_water:
            self.num_recomputed_tokens += min(after, high_water) - before
        if after > high_water:
            request.high_water_tokens = after
        if before < request.num_prompt_tokens:
            self.num_prompt_tokens += min(after, request.num_prompt_tokens) - before

    def count_prefix(self, num_tokens: int, num_hits: int, misses: PrefixMisses) -> None:
        """A request of `num_tokens` was admitted for the first time."""
        self.prefix_cache_queries += num_tokens
        self.prefix_cache_hits += num_hits
        self.prefix_misses_new += misses.num_new_tokens
        self.prefix_misses_evicted += misses.num_evicted_tokens
        self.prefix_misses_tail += misses.num_tail_tokens


class AdmissionStop(enum.Enum):
    """Why a pass over the queue let nobody further run."""

    QUEUE_EMPTY = "queue empty"
    CAPACITY = "capacity"
    """No seat, or too few blocks, for the first in the queue."""
    BUDGET = "budget"
    """There is room, but the step's tokens were used up: the next step looks again."""


@dataclass(slots=True, frozen=True)
class WaitingCounts:
    """The sequences that wait, by what they wait for."""

    num_for_capacity: int
    """Seats or blocks."""
    num_deferred: int
    """Only for a step: one with tokens left, or the one that computes the prompt they share with their leader."""
