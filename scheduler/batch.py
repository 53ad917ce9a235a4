"""The contract between scheduler and model: what one step computes, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from msgspec import structs

from .sampling_params import SamplingParams


@dataclass(slots=True, frozen=True)
class BlockCopy:
    """Copy one block's K/V of every layer of a group before the step writes anything (copy-on-write)."""

    source: int
    target: int
    group: int = 0
    """The layer group, each of which has block ids of its own."""


class ScheduledRow(msgspec.Struct, frozen=True, eq=False, gc=False):
    """One sequence's share of a step: tokens [num_computed, num_computed + num_scheduled) are run.

    `token_ids` and `block_ids` are live views of the scheduler's state: read them during the step only.
    There is one for each sequence and step, so they must be cheap to make: a struct, which no reference cycle goes
    through (the garbage collector does not look at it).
    """

    seq_id: str
    """Unique among live sequences; a request with n > 1 has n of them."""
    token_ids: Sequence[int]
    """Prompt and output, as far as known. [num_tokens - num_unknown_tokens]"""
    num_prompt_tokens: int
    num_computed_tokens: int
    """Tokens whose K/V are in the pool already."""
    num_scheduled_tokens: int
    """≥ 1."""
    block_ids: tuple[Sequence[int], ...]
    """The block table of each layer group; it covers every token up to the last scheduled one, and holds block 0 where
    nothing is left that one of the scheduled tokens sees. While a sequence runs, the same tuple in every step; when it
    comes back after a preemption, or its id is used again, another."""
    params: SamplingParams
    seed: int
    """Key of the counter-based generator, 64 bits; its counter is the position of the drawn token."""
    eos_token_ids: tuple[int, ...] = ()
    """Ids that must not be drawn before `params.min_tokens` outputs."""
    num_unknown_tokens: int = 0
    """1 if the newest token is what the step before this one draws, which nobody has looked at yet."""
    owner: Any = None
    """The scheduler's own record of the sequence, nobody else's business. Ids are used again, this is not."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_unknown_tokens

    @property
    def num_tokens_after(self) -> int:
        return self.num_computed_tokens + self.num_scheduled_tokens

    @property
    def draws_token(self) -> bool:
        """Whether this step reaches the newest token, so that the next one is drawn from its logits."""
        num_tokens = len(self.token_ids) + self.num_unknown_tokens
        return self.num_computed_tokens + self.num_scheduled_tokens == num_tokens

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens


@dataclass(slots=True)
class ScheduledBatch:
    """Everything the runner needs for one step. Rows are ordered decode-first."""

    rows: list[ScheduledRow]
    num_decode_rows: int
    """Rows [0, num_decode_rows) have exactly one scheduled token each, later rows more."""
    block_copies: list[BlockCopy] = field(default_factory=list)
    finished_seq_ids: list[str] = field(default_factory=list)
    """Sequences that ended since the last step: the core has the runner let go of them (`release`) before the step."""

    @property
    def num_tokens(self) -> int:
        return self.num_decode_rows + sum(row.num_scheduled_tokens for row in self.rows[self.num_decode_rows :])

    @property
    def only_decodes(self) -> bool:
        """Whether all of it is one token per row, each at its sequence's end, so that every row draws."""
        rows = self.rows
        if not self.num_decode_rows == len(rows) > 0:
            return False
        # A row draws if nothing is left to compute of its sequence after it.
        return max([len(row.token_ids) + row.num_unknown_tokens - row.num_computed_tokens for row in rows]) == 1

    def part(self, start: int, stop: int) -> ScheduledBatch:
        """Rows [start, stop) alone, for finding the row that makes a step fail. Copies are not repeated."""
        return ScheduledBatch(self.rows[start:stop], max(0, min(stop, self.num_decode_rows) - start))

    def known(self) -> ScheduledBatch:
        """The same rows now that the step before has been taken in: nothing is unknown any more. Without copies."""
        return ScheduledBatch([structs.replace(row, num_unknown_tokens=0) for row in self.rows], self.num_decode_rows)


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position, natural log, of the distribution after logit processing at
    temperature 1 (as OpenAI reports them): the drawn token first, then the most probable ones."""

    token_ids: list[int]
    logprobs: list[float]


class SampledRow(msgspec.Struct, frozen=True, gc=False):
    """What one row drew. More than one token only under speculation."""

    seq_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None


class PendingStep(Protocol):
    """A step that was launched and may still be running."""

    def result(self) -> StepResult:
        """Wait for it. Raises what the step raised, or FloatingPointError if a row's logits are NaN."""
        ...


@dataclass(slots=True, frozen=True)
class StepResult:
    """What the runner returns for a batch: one entry for each row that draws, in row order."""

    sampled: list[SampledRow]
    forward_seconds: float = 0.0
    sample_seconds: float = 0.0

    def result(self) -> StepResult:
        """A step that has run is its own `PendingStep`."""
        return self
