"""Decode steps as CUDA graphs: one launch instead of hundreds, so that the host is not what a small step waits for.

A shape's first step runs as it is, which compiles kernels and lets libraries allocate; its second is captured. So the
server is ready without waiting for graphs. All of them share one memory pool, since no two ever run at once.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from .decode_step import DecodeStep, StepShape

logger = logging.getLogger("octavo.model")

_SIZES: tuple[int, ...] = (1, 2, 4, 8)
_SIZE_STEP = 8
_SHORTEST_KV_LEN = 2048
_KV_LEN_FACTOR = 8
_USES_BEFORE_CAPTURE = 2
"""A shape that is met only in passing, while a batch fills or drains, is not worth a capture."""


def graph_size(num_rows: int) -> int:
    """The captured size that serves a batch: 1, 2, 4, 8, and from there every multiple of 8."""
    for size in _SIZES:
        if num_rows <= size:
            return size
    return -(-num_rows // _SIZE_STEP) * _SIZE_STEP


def kv_len_bucket(kv_len: int, max_model_len: int) -> int:
    """The captured context that serves a batch. Few are enough: a backend sees to it that a launch for longer ones
    costs little, however skewed a batch is."""
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
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def shape(self, num_rows: int, max_kv_len: int) -> StepShape:
        """What to load and run for a batch."""
        return StepShape(min(graph_size(num_rows), self._max_rows), kv_len_bucket(max_kv_len, self.step.max_model_len))

    def run(self, shape: StepShape) -> None:
        """Compute the rows that were loaded for `shape`."""
        if self._enabled and shape not in self._graphs:
            self._uses[shape] = self._uses.get(shape, 0) + 1
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
            self._record(graph, shape)
        except RuntimeError as error:
            # The next shape would hardly do better, and each attempt costs a step its time.
            self._enabled = False
            logger.warning("from %d rows on, decoding goes on without new CUDA graphs: %s", shape.num_rows, error)
            return None
        return graph

    def _record(self, graph: torch.cuda.CUDAGraph, shape: StepShape) -> None:
        """`torch.cuda.graph` would do, but it waits for the device and gives all spare memory back to the driver first:
        a pause for everybody being served, and another where the next step asks for that memory again."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.stream(self._stream):
            # Other threads may go on using the device.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                self.step.compute(shape)
            finally:
                graph.capture_end()
