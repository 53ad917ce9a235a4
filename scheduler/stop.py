"""Stopping at the level of tokens: eos, stop ids, length. Stop strings need text and are handled in front."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .request import Request


@dataclass(slots=True, frozen=True)
class Stop:
    """Why a sample has ended of itself."""

    reason: Literal["stop", "length"]
    token_id: int | None = None
    """The eos or stop id that ended it."""


def check_stop(request: Request) -> Stop | None:
    """Whether the newest known token of `request` ends it. A stop id counts from `min_tokens` on, length always."""
    token_ids = request.token_ids
    token_id = token_ids[-1]
    if token_id in request.stop_token_ids and request.num_output_tokens >= request.params.min_tokens:
        return Stop("stop", token_id)
    if len(token_ids) >= request.max_total_tokens:
        return Stop("length")
    return None
