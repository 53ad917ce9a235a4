"""Captured decode steps, without a GPU: torch's graphs are replaced by ones that note what happens to them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from octavo.model.cuda_graph import DecodeGraphs, graph_size, kv_len_bucket
from octavo.model.decode_step import StepShape


class Step:
    """A DecodeStep that computes nothing; `broken` makes it fail while it is captured."""

    max_model_len = 100_000

    def __init__(self) -> None:
        self.drawn = torch.zeros(1)
        self.events: list[str] = []
        self.capturing = False
        self.broken = False

    def compute(self, shape: StepShape) -> None:
        self.events.append("capture" if self.capturing else "compute")
        if self.capturing and self.broken:
            raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Step:
    step = Step()

    class Graph:
        def capture_begin(self, **_: Any) -> None:
            step.capturing = True

        def capture_end(self) -> None:
            step.capturing = False

        def replay(self) -> None:
            step.events.append("replay")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return step


def graphs(step: Step) -> DecodeGraphs:
    found = DecodeGraphs(step, max_rows=256)  # type: ignore[arg-type]
    found._enabled = True
    return found


def test_a_shape_is_run_once_before_it_is_captured_and_then_replayed(step: Step) -> None:
    found = graphs(step)
    for _ in range(3):
        found.run(StepShape(8, 2048))
    assert step.events == ["compute", "capture", "replay", "replay"]
    found.run(StepShape(16, 2048))
    assert step.events[4:] == ["compute"]


def test_steps_go_on_when_a_capture_fails_and_what_was_captured_stays(
    step: Step, caplog: pytest.LogCaptureFixture
) -> None:
    found, good, bad = graphs(step), StepShape(8, 2048), StepShape(16, 2048)
    for _ in range(2):
        found.run(good)
    step.broken = True
    step.events.clear()
    for shape in (bad, bad, bad, good, StepShape(24, 2048), StepShape(24, 2048), StepShape(24, 2048)):
        found.run(shape)
    assert step.events == ["compute", "capture", "compute", "compute", "replay", "compute", "compute", "compute"]
    assert not step.capturing
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_few_shapes_serve_all_batches() -> None:
    assert {graph_size(rows) for rows in range(1, 257)} == {1, 2, 4, *range(8, 257, 8)}
    for rows in range(1, 257):
        assert rows <= graph_size(rows) <= max(8, rows + 32)
        assert graph_size(rows) >= rows
        if rows > 8:
            assert graph_size(rows) - rows <= max(8, rows // 4)
    assert [kv_len_bucket(n, 131072) for n in (1, 2048, 2049, 16384, 16385, 131072)] == [
        2048, 2048, 16384, 16384, 131072, 131072,
    ]  # fmt: skip
    assert kv_len_bucket(5000, 8192) == 8192
