"""How fast the queue empties: what a client that was turned away is told to wait."""

from __future__ import annotations

import math
import time
from collections import deque

MAX_DRAIN_SECONDS = 60


class DrainRate:
    """The rate at which samples have ended lately, and the length of the queue."""

    def __init__(self) -> None:
        self._num_waiting = 0
        self._ends: deque[float] = deque(maxlen=512)
        """When the last samples ended, oldest first. They end in batches: enough for several of them."""
        self._pressed_since: float | None = None
        """When the engine's idleness, or the emptiness of its queue, ended; None while it is idle."""

    def on_load(self, num_running: int, num_waiting: int) -> None:
        """The engine's load after a step."""
        if num_running + num_waiting == 0:
            self._pressed_since = None
        elif self._pressed_since is None or (num_waiting and not self._num_waiting):
            self._pressed_since = time.monotonic()
        self._num_waiting = num_waiting

    def on_end(self, now: float) -> None:
        """One sample has ended well."""
        self._ends.append(now)

    def seconds(self) -> int:
        """About how long what waits now, and one more, will take to be served, 1 … MAX_DRAIN_SECONDS.

        "Lately" begins when the load did, so that idle time is no part of the rate.
        """
        ends, since = self._ends, self._pressed_since
        if since is None:
            return 1
        if len(ends) == ends.maxlen:
            since = max(since, ends[0])
        elapsed = time.monotonic() - since
        num_ends = sum(end > since for end in ends)
        # Where nothing has ended yet, the best guess is that it takes as long again.
        seconds = (self._num_waiting + 1) * elapsed / num_ends if num_ends else elapsed
        return max(1, min(MAX_DRAIN_SECONDS, math.ceil(seconds)))
