"""Hand-built steps on a tiny model, and the ceilings on small buffers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from octavo.model.config import ModelConfig
from octavo.model.memory import FreeMemory
from octavo.model.spec import ModelError
from octavo.server.bench import ceilings, roofline_steps
from octavo.server.bench.roofline import StepShape
from octavo.server.bench.roofline_steps import StepBench
from tiny_checkpoint import SPEC


def bench(folder: Path, shapes: list[StepShape]) -> StepBench:
    return StepBench(ModelConfig(path=str(folder), dtype="float32", device="cpu"), 16, shapes)


def test_steps_run_over_blocks_of_their_own(tiny_checkpoint: Path) -> None:
    shapes = [StepShape(3, 40, 1), StepShape(1, 0, 20), StepShape(1, 40, 20)]
    steps = bench(tiny_checkpoint, shapes)
    assert steps.fitting == shapes
    for shape in shapes:
        batch = steps._batch(shape)
        used = [block_id for row in batch.rows for block_id in row.block_ids[0]]
        assert len(set(used)) == len(used) == shape.num_rows * -(-(shape.num_context + shape.num_new) // 16)
        assert 0 not in used
        assert batch.num_tokens == shape.num_tokens
        assert all(row.draws_token for row in batch.rows)
        logits = steps.runner.forward_logits(batch)
        assert logits.shape == (shape.num_rows, 320)
        assert torch.isfinite(logits).all()
        assert len(steps.measure(shape, 2)) == 2


def test_the_pool_is_noise_everywhere(tiny_checkpoint: Path) -> None:
    (pool,) = bench(tiny_checkpoint, [StepShape(2, 30, 1)]).runner.kv_pools
    assert torch.isfinite(pool).all()
    assert (pool.flatten(2).std(-1) > 0).all()


def test_what_does_not_fit_is_left_out_and_nothing_fitting_is_an_error(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = StepShape(1, 40, 1), StepShape(8, 40, 1)
    needed = bench(tiny_checkpoint, [small]).pool_bytes(small)
    free = FreeMemory("cpu", int(needed / 0.6) + 1, 2**40)
    monkeypatch.setattr(roofline_steps, "free_memory", lambda device: free)
    steps = bench(tiny_checkpoint, [small, large])
    assert steps.fitting == [small]
    assert len(steps.measure(small, 1)) == 1
    with pytest.raises(ModelError, match="smaller --batch"):
        bench(tiny_checkpoint, [large])


def test_ceilings_are_the_best_of_their_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings._READ_BYTES, "cpu", 2**20)
    monkeypatch.setitem(ceilings._SQUARES, "cpu", (32, 64))
    monkeypatch.setitem(ceilings._MODEL_ROWS, "cpu", 8)
    found = ceilings.measure_ceilings(torch.device("cpu"), torch.float32, SPEC)
    assert [probe.name for probe in found.matmul] == ["8 × 64 × 192", "8 × 96 × 64", "32 × 32 × 32", "64 × 64 × 64"]
    for probe in (*found.read, *found.copy, *found.matmul):
        assert probe.best >= probe.median > 0
    assert found.bytes_per_second == max(probe.best for probe in found.read)
    assert found.flops_per_second == max(probe.best for probe in found.matmul)
