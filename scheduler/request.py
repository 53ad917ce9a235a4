"""The state of one sample of a request, from its arrival to its one end."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from hashlib import blake2b

from ..block_manager.hashing import BlockHashes
from .batch import ScheduledRow
from .sampling_params import SamplingParams


class RequestStatus(enum.Enum):
    WAITING = "waiting"
    """In the queue, holding no blocks; `num_preemptions` tells whether it ran before."""
    HELD = "held"
    """A further sample (n > 1) until its leader has computed the prompt they share."""
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """One sample being generated. Only the scheduler changes it."""

    __slots__ = (
        "arrival_time",
        "block_hashes",
        "block_ids",
        "first_token_time",
        "held_siblings",
        "high_water_tokens",
        "last_token_time",
        "max_total_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_drawing_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_writable_tokens",
        "order",
        "params",
        "passes_next_at",
        "priority",
        "request_id",
        "sample_index",
        "scheduled_time",
        "seed",
        "seq_id",
        "status",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        sample_index: int,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        seed: int,
        order: tuple[int, int, int],
        max_total_tokens: int,
        eos_token_ids: Sequence[int],
        block_size: int,
        cache_salt: str,
        arrival_time: float,
    ) -> None:
        self.request_id = request_id
        self.sample_index = sample_index
        self.seq_id = f"{request_id}/{sample_index}"
        self.params = params
        self.seed = derive_seed(seed, sample_index)
        self.order = order
        """(priority, arrival number, sample): smaller is served earlier; kept through preemptions."""
        self.priority = order[0]
        self.status = RequestStatus.WAITING
        self.token_ids = list(prompt_token_ids)
        """Prompt and output, as far as known."""
        self.num_drawing_tokens = 0
        """Tokens behind them that scheduled steps draw: their number is known, their ids are not yet."""
        self.num_prompt_tokens = len(prompt_token_ids)
        self.max_total_tokens = max_total_tokens
        """Prompt and output together: the request's own limit or the context's, whichever is less."""
        self.stop_token_ids = frozenset(
            params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *eos_token_ids)
        )
        """Every id that ends it, eos included where it does."""
        self.num_computed_tokens = 0
        """Leading tokens whose K/V are in this request's blocks, once the steps scheduled so far have run. It chases
        `num_tokens`."""
        self.block_ids: tuple[list[int], ...] = ()
        """Live views of its block tables while it runs, one tuple from each admission to the next."""
        self.num_writable_tokens = 0
        """Tokens [num_computed_tokens, num_writable_tokens) have blocks that nobody else sees, so that a step which
        writes no further need not ask the block manager. Most decodes stay in the block that the last one wrote."""
        self.passes_next_at = 0
        """How many tokens must be computed before the block manager is to be told that a window has moved on."""
        self.high_water_tokens = 0
        """The most that num_computed_tokens ever was: computing below it again is waste."""
        self.num_cached_tokens = 0
        """Prompt tokens that the first admission found in the prefix cache."""
        self.num_preemptions = 0
        self.block_hashes = BlockHashes(block_size, cache_salt)
        self.held_siblings: list[Request] = []
        self.arrival_time = arrival_time
        self.scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output, those being drawn included."""
        return len(self.token_ids) + self.num_drawing_tokens

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that no step has been scheduled for: 1 while decoding, more while (re)filling."""
        return len(self.token_ids) + self.num_drawing_tokens - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        """Known ones."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_complete(self) -> bool:
        """Whether the token being drawn is the last that fits: nothing is left to schedule."""
        drawing = self.num_drawing_tokens
        return drawing > 0 and len(self.token_ids) + drawing >= self.max_total_tokens

    def __repr__(self) -> str:
        return (
            f"Request({self.seq_id}, {self.status.value}, {self.num_computed_tokens}/{self.num_tokens} tokens computed)"
        )


def make_samples(
    request_id: str,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    *,
    seed: int,
    order: tuple[int, int],
    max_total_tokens: int,
    eos_token_ids: tuple[int, ...],
    block_size: int,
    cache_salt: str,
    arrival_time: float,
) -> list[Request]:
    """A request's `params.n` samples: the leader, which holds the others until it has computed their prompt.
    `order` is the request's (priority, arrival number)."""
    samples = [
        Request(
            request_id,
            index,
            prompt_token_ids,
            params,
            seed=seed,
            order=(*order, index),
            max_total_tokens=max_total_tokens,
            eos_token_ids=eos_token_ids,
            block_size=block_size,
            cache_salt=cache_salt,
            arrival_time=arrival_time,
        )
        for index in range(params.n)
    ]
    leader, siblings = samples[0], samples[1:]
    for sibling in siblings:
        sibling.status = RequestStatus.HELD
    leader.held_siblings = siblings
    return samples


def derive_seed(seed: int, sample_index: int) -> int:
    """64 bits that differ between the samples of a request and repeat with its seed."""
    digest = blake2b(f"{seed}/{sample_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


_FINISHED = RequestStatus.FINISHED
"""Compared with for every row of a step: an enum's members are slow to reach."""


def live_owner(row: ScheduledRow) -> Request | None:
    """The request that a row was scheduled for, None if it has ended. Not by id: another one may have that by now."""
    request: Request = row.owner
    return None if request.status is _FINISHED else request
