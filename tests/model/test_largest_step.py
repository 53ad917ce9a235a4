"""The largest step is run before the pool is sized, and what it took is left to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from octavo.model import memory, runner
from octavo.model.config import ModelConfig
from octavo.model.largest_step import CudaMemory, largest_batches, measure
from octavo.model.memory import FreeMemory
from octavo.model.runner import ModelRunner
from octavo.model.spec import ModelError
from octavo.scheduler.batch import ScheduledBatch, ScheduledRow
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as TransformersLlama

BLOCK = 16
BLOCK_BYTES = 2 * 2 * 16 * BLOCK * 4  # K and V of two heads of 16 in fp32, one layer
MIB = 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    TransformersLlama(config).save_pretrained(folder)
    return folder


class FakeMemory:
    """Counts as a device would on which a step takes `step_bytes`, and `kept_bytes` of them for good."""

    def __init__(self, step_bytes: int, kept_bytes: int = 0) -> None:
        self.step_bytes, self.kept_bytes = step_bytes, kept_bytes
        self.reserved = self.peak = 7 * MIB
        self.batches: list[ScheduledBatch] = []

    def settle(self) -> None:
        self.peak = self.reserved

    def reserved_bytes(self) -> int:
        return self.reserved

    def peak_bytes(self) -> int:
        return self.peak

    def step(self, batch: ScheduledBatch) -> None:
        if not self.batches:
            self.reserved += self.kept_bytes
        self.batches.append(batch)
        self.peak = max(self.peak, self.reserved + self.step_bytes - self.kept_bytes)


def on_device(monkeypatch: pytest.MonkeyPatch, fake: FakeMemory, free_bytes: int) -> None:
    """Runs on the CPU take `fake` for a CUDA device with so much free memory, its kept bytes already gone."""
    launch = ModelRunner.launch

    def counted(self: ModelRunner, batch: ScheduledBatch) -> object:
        fake.step(batch)
        return launch(self, batch)

    def free(device: torch.device) -> FreeMemory:
        return FreeMemory("cuda", free_bytes - (fake.reserved - 7 * MIB), 100 * MIB)

    monkeypatch.setattr(runner, "device_memory", lambda device: fake)
    monkeypatch.setattr(memory, "free_memory", free)
    monkeypatch.setattr(ModelRunner, "launch", counted)


def allocate(
    checkpoint: Path, backend: str = "reference", **settings: int | None
) -> tuple[ModelRunner, memory.CachePlan]:
    config = ModelConfig(path=str(checkpoint), dtype="float32", device="cpu", kernel_backend=backend)
    made = ModelRunner(config, block_size=BLOCK)
    wanted: dict[str, int | None] = {"kv_cache_memory": None, "max_num_seqs": 2000, "max_model_len": None}
    plan = made.allocate_cache(**(wanted | {"max_num_batched_tokens": 300} | settings))  # type: ignore[arg-type]
    return made, plan


@pytest.mark.parametrize("kept", [0, 3 * MIB])
def test_the_pool_leaves_what_the_largest_step_took(checkpoint, monkeypatch, kept):
    """Counted once, whether it is kept from then on or not: what is kept is missing in the free memory already."""
    fake = FakeMemory(step_bytes=5 * MIB, kept_bytes=kept)
    on_device(monkeypatch, fake, free_bytes=40 * MIB)
    made, plan = allocate(checkpoint)
    # 8 % of the whole device are left to libraries.
    assert plan.pools[0].num_blocks == int((40 - 8 - 5) * MIB) // BLOCK_BYTES
    assert made.kv_pools[0].shape[1] == plan.pools[0].num_blocks
    assert [batch.num_tokens for batch in fake.batches] == [300, 300, 300]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_real_step_runs_before_the_pool_is_there_and_leaves_nothing_behind(checkpoint, monkeypatch, backend):
    fake = FakeMemory(step_bytes=MIB)
    on_device(monkeypatch, fake, free_bytes=40 * MIB)
    made, plan = allocate(checkpoint, backend, max_num_seqs=3, max_num_batched_tokens=40)
    assert max(row.num_tokens for batch in fake.batches for row in batch.rows) == 256 == plan.max_model_len
    assert not made.kv_pools[0].any()
    prompt = list(range(3, 40))
    row = ScheduledRow(
        "largest/0", prompt, len(prompt), 0, len(prompt), ([1, 2, 3],), fake.batches[0].rows[0].params, 1
    )
    first = made.execute(ScheduledBatch([row], 0))
    fresh, _ = allocate(checkpoint, backend, kv_cache_memory=64 * BLOCK_BYTES)
    second = fresh.execute(ScheduledBatch([under_another_name(row)], 0))
    assert first.sampled[0].token_ids == second.sampled[0].token_ids


def under_another_name(row: ScheduledRow) -> ScheduledRow:
    return ScheduledRow(
        "other", row.token_ids, row.num_prompt_tokens, 0, row.num_scheduled_tokens, row.block_ids, row.params, row.seed
    )


def test_a_given_pool_is_not_measured(checkpoint, monkeypatch):
    fake = FakeMemory(step_bytes=MIB)
    on_device(monkeypatch, fake, free_bytes=40 * MIB)
    _, plan = allocate(checkpoint, kv_cache_memory=20 * BLOCK_BYTES)
    assert plan.pools[0].num_blocks == 20
    assert not fake.batches


def test_a_shortage_says_what_the_step_takes_and_what_to_change(checkpoint, monkeypatch):
    on_device(monkeypatch, FakeMemory(step_bytes=32 * MIB), free_bytes=40 * MIB)
    with pytest.raises(ModelError, match=r"largest step takes 32\.0 MiB, less with a smaller max-num-batched-tokens"):
        allocate(checkpoint)


def test_a_step_that_does_not_fit_at_all_says_what_to_change(checkpoint, monkeypatch):
    fake = FakeMemory(step_bytes=MIB)
    on_device(monkeypatch, fake, free_bytes=40 * MIB)

    def fail(batch: ScheduledBatch) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fake, "step", fail)
    with pytest.raises(ModelError, match=r"not enough memory for a step of 300 tokens .* max-num-batched-tokens"):
        allocate(checkpoint)


@given(
    num_seqs=st.integers(1, 40), budget=st.integers(1, 200), longest=st.integers(1, 90), block=st.sampled_from([8, 16])
)
def test_no_step_is_larger(num_seqs, budget, longest, block):
    mixed, *decodes = largest_batches(
        max_num_seqs=num_seqs, max_num_batched_tokens=budget, max_model_len=longest, block_size=block, num_groups=2
    )
    assert mixed.num_tokens == min(budget, num_seqs * longest)
    assert len(mixed.rows) == min(num_seqs, budget)
    assert all(row.draws_token for row in mixed.rows)
    for batch in (mixed, *decodes):
        assert [row.num_scheduled_tokens > 1 for row in batch.rows] == sorted(
            row.num_scheduled_tokens > 1 for row in batch.rows
        )
        assert max(row.num_tokens for row in batch.rows) == longest
        assert all(len(ids) * block >= row.num_tokens for row in batch.rows for ids in row.block_ids)
        assert all(len(row.block_ids) == 2 for row in batch.rows)
    assert [batch.num_decode_rows for batch in decodes] == [len(mixed.rows)] * 2


def test_what_is_given_back_before_the_end_counts_at_its_peak():
    fake = FakeMemory(step_bytes=4 * MIB, kept_bytes=MIB)
    batch = ScheduledBatch([], 0)
    assert measure(fake, [batch, batch], fake.step, lambda: None) == 3 * MIB
    fake.settle()
    assert fake.peak_bytes() == fake.reserved_bytes() == 8 * MIB


def test_torchs_allocator_is_asked_on_a_cuda_device(monkeypatch):
    calls: list[str] = []
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device, name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 9)
    counter = CudaMemory(torch.device("cuda"))
    counter.settle()
    assert calls == ["synchronize", "empty_cache", "reset_peak_memory_stats"]
    assert (counter.reserved_bytes(), counter.peak_bytes()) == (5, 9)
