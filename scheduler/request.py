"""The state of one sample of a request, from its arrival to its one end."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from hashlib import blake2b

from ..block_manager.hashing import BlockHashes
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
        "order",
        "params",
        "priority",
        "request_id",
        "sample_index",
        "scheduled_time",
        "seed",
        "seq_id",
        "status",
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
        self.num_computed_tokens = 0
        """Leading tokens whose K/V are in this request's blocks, once the steps scheduled so far have run. It chases
        `num_tokens`."""
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
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        """Known ones."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_complete(self) -> bool:
        """Whether the token being drawn is the last that fits: nothing is left to schedule."""
        return self.num_drawing_tokens > 0 and self.num_tokens >= self.max_total_tokens

    def __repr__(self) -> str:
        return (
            f"Request({self.seq_id}, {self.status.value}, {self.num_computed_tokens}/{self.num_tokens} tokens computed)"
        )


def derive_seed(seed: int, sample_index: int) -> int:
    """64 bits that differ between the samples of a request and repeat with its seed."""
    digest = blake2b(f"{seed}/{sample_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
