"""How the token budget of one step is shared out."""

from __future__ import annotations

from collections.abc import Callable

from .request import Request

MIN_CHUNK = 32
"""Tokens; a smaller piece of a prompt is not worth a row."""


class StepBudget:
    """The tokens of one step. Who comes first is served first, but a prompt that cannot finish in this step anyway
    leaves half of the rest to those behind it, so that a short prompt never waits for the whole of a long one."""

    def __init__(self, num_tokens: int, reserve: Callable[[Request, int], int]) -> None:
        """`reserve` finds blocks for a request's next so many tokens, or for the first of them, and says for how many.
        It is asked again, for more, when there is more to give."""
        self.left = num_tokens
        self._reserve = reserve
        self._shares: dict[str, tuple[Request, int]] = {}

    def take(self, request: Request) -> int:
        """This request's tokens of this step, 0 if nothing is left, or there is no block for one."""
        pending = request.num_pending_tokens
        count = pending if pending <= self.left else min(self.left, max(self.left // 2, MIN_CHUNK))
        count = self._reserve(request, count) if count > 0 else 0
        if count > 0:
            self._shares[request.seq_id] = (request, count)
            self.left -= count
        return count

    def spread(self) -> None:
        """Give what nobody behind wanted back to those who could use more, first come, first served."""
        for seq_id, (request, count) in self._shares.items():
            more = min(self.left, request.num_pending_tokens - count)
            if more > 0:
                granted = self._reserve(request, count + more)
                self._shares[seq_id] = (request, granted)
                self.left -= granted - count

    def shares(self) -> list[tuple[Request, int]]:
        """Each request with its tokens, single tokens (decodes) first."""
        return sorted(self._shares.values(), key=lambda share: share[1] > 1)
