"""Decode steps as CUDA graphs: one launch instead of hundreds, so that the host is not what a small step waits for.

Graphs are captured when their shape is first met twice, so the server is ready without waiting for them. All of them
share one memory pool, since no two ever run at once.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from .decode_step import DecodeStep, StepShape

logger = logging.getLogger("octavo.model")

_SMALL_SIZES = (1, 2, 4, 8)
_SIZE_STEP = 8
_SHORTEST_KV_LEN = 2048
_KV_LEN_FACTOR = 4
_USES_BEFORE_CAPTURE = 2
"""A shape that is met only in passing, while a batch fills or drains, is not worth a capture."""


def graph_size(num_rows: int) -> int:
    """The captured size that serves a batch: 1, 2, 4, 8, and from there every multiple of 8."""
    for size in _SMALL_SIZES:
        if num_rows <= size:
            return size
    return -(-num_rows // _SIZE_STEP) * _SIZE_STEP


def kv_len_bucket(kv_len: int, max_model_len: int) -> int:
    """The captured context that serves a batch: a launch for longer ones has more programs that find nothing to do."""
    bucket = _SHORTEST_KV_LEN
    while bucket < kv_len:
        bucket *= _KV_LEN_FACTOR
    return min(bucket, max_model_len)


class DecodeGraphs:
    """Runs a `DecodeStep` by replaying captures of it; without a GPU, or beyond `max_rows`, as it is."""

    def __init__(self, step: DecodeStep, *, max_rows: int) -> None:
        self.step = step
        self._max_rows = max_rows
        self._enabled = step.drawn.device.type == "cuda"
        self._uses: dict[StepShape, int] = {}
        self._graphs: dict[StepShape, torch.cuda.CUDAGraph | None] = {}
        """None: it could not be captured, and is run as it is."""
        self._pool: Any = None

    def shape(self, num_rows: int, max_kv_len: int) -> StepShape:
        """What to load and run for a batch."""
        return StepShape(min(graph_size(num_rows), self._max_rows), kv_len_bucket(max_kv_len, self.step.max_model_len))

    def run(self, shape: StepShape) -> None:
        """Compute the rows that were loaded for `shape`."""
        if self._enabled and shape not in self._graphs:
            self._uses[shape] = self._uses.get(shape, 0) + 1
            # The first run compiles kernels and lets libraries allocate, neither of which can be captured.
            if self._uses[shape] >= _USES_BEFORE_CAPTURE:
                self._graphs[shape] = self._capture(shape)
        graph = self._graphs.get(shape)
        if graph is None:
            self.step.compute(shape)
        else:
            graph.replay()

    def _capture(self, shape: StepShape) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                self.step.compute(shape)
        except RuntimeError as error:
            logger.warning("decoding %d rows stays without a CUDA graph: %s", shape.num_rows, error)
            return None
        self._pool = graph.pool()
        return graph
