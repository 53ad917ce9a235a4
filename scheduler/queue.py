"""The waiting queue: by priority, then first come, first served."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from .request import Request


class WaitingQueue:
    """A heap keyed by `Request.order`. A preempted request keeps its order and so returns to the front of its class.

    Removal marks an entry dead and lets it fall out later, so every operation is O(log n) amortised.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], str]] = []
        self._live: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Request]:
        """In no particular order."""
        return iter(self._live.values())

    def push(self, request: Request) -> None:
        self._live[request.seq_id] = request
        heapq.heappush(self._heap, (request.order, request.seq_id))

    def peek(self) -> Request | None:
        while self._heap and self._heap[0][1] not in self._live:
            heapq.heappop(self._heap)
        return self._live[self._heap[0][1]] if self._heap else None

    def remove(self, request: Request) -> None:
        del self._live[request.seq_id]
        if len(self._heap) > 64 and len(self._heap) > 4 * len(self._live):
            self._heap = [entry for entry in self._heap if entry[1] in self._live]
            heapq.heapify(self._heap)
