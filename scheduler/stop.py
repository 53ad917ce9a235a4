"""Stopping at the level of tokens: eos, stop ids, length. Stop strings need text and are handled in front."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from .request import Request


@dataclass(slots=True, frozen=True)
class Stop:
    """Why a sample has ended of itself."""

    reason: Literal["stop", "length"]
    token_id: int | None = None
    """The eos or stop id that ended it."""


def check_stop(request: Request, eos_token_ids: Collection[int]) -> Stop | None:
    """Whether the newest known token of `request` ends it. A stop id counts from `min_tokens` on, length always."""
    token_id = request.token_ids[-1]
    params = request.params
    if request.num_output_tokens >= params.min_tokens and (
        token_id in params.stop_token_ids or (not params.ignore_eos and token_id in eos_token_ids)
    ):
        return Stop("stop", token_id)
    if len(request.token_ids) >= request.max_total_tokens:
        return Stop("length")
    return None
