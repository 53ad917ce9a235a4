"""How the pool is sized, and what is said when it cannot be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from octavo.model import memory
from octavo.model.kv_cache import allocate_pools, bytes_per_block, layers_of
from octavo.model.memory import CachePlan, CacheRequest, PoolPlan, is_out_of_memory, plan_cache
from octavo.model.spec import ModelError
from small_spec import SPEC

CPU = torch.device("cpu")
BLOCK_BYTES = 2 * 3 * 2 * 16 * 16 * 4


def request(**changes: object) -> CacheRequest:
    settings: dict[str, object] = {
        "block_size": 16,
        "dtype": torch.float32,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
    }
    return CacheRequest(**(settings | changes))  # type: ignore[arg-type]


def test_bytes_per_block_counts_keys_and_values_of_all_layers():
    assert bytes_per_block(SPEC, 16, torch.float32) == BLOCK_BYTES
    assert bytes_per_block(SPEC, 32, torch.bfloat16) == BLOCK_BYTES


def test_a_given_memory_is_used_in_full():
    plan = plan_cache(SPEC, request(kv_cache_memory=100 * BLOCK_BYTES + 7), CPU)
    assert (plan.usable_blocks, plan.max_model_len, plan.kv_cache_bytes) == ([99], 1024, 100 * BLOCK_BYTES)
    assert plan.notes == ()


def test_a_given_memory_is_not_capped_by_what_the_sequences_can_use():
    """Blocks beyond that still serve the prefix cache."""
    plan = plan_cache(SPEC, request(kv_cache_memory=2000 * BLOCK_BYTES), CPU)
    assert plan.usable_blocks == [1999]
    assert 1999 > 8 * 64


def test_no_more_of_the_free_memory_is_taken_than_the_sequences_can_use(monkeypatch):
    monkeypatch.setattr(memory, "available_cpu_bytes", lambda: 10**12)
    assert plan_cache(SPEC, request(), CPU).usable_blocks == [8 * 64]
    assert plan_cache(SPEC, request(max_model_len=17), CPU).usable_blocks == [8 * 2]


def test_more_than_the_free_memory_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_cpu_bytes", lambda: 2**30)
    with pytest.raises(ModelError, match=r"1000\.00 GiB exceeds the 1\.00 GiB of memory that are free; give less"):
        plan_cache(SPEC, request(kv_cache_memory=1000 * 2**30), CPU)
    assert plan_cache(SPEC, request(kv_cache_memory=2**30), CPU).kv_cache_bytes <= 2**30


def test_attention_and_rotations_are_left_room(monkeypatch):
    monkeypatch.setattr(memory, "available_cpu_bytes", lambda: 2**30)
    seen = []
    few = plan_cache(SPEC, request(max_num_seqs=10**4, attention_bytes=lambda n: seen.append(n) or 2**28), CPU)
    many = plan_cache(SPEC, request(max_num_seqs=10**4), CPU)
    assert seen == [1024]
    assert 0 <= many.kv_cache_bytes - few.kv_cache_bytes - 2**28 < BLOCK_BYTES


def test_a_context_of_billions_is_fitted(monkeypatch):
    """No table and no estimate may follow the config's number; the pool does not hold that many."""
    monkeypatch.setattr(memory, "available_cpu_bytes", lambda: 2**28)
    spec = dataclasses.replace(SPEC, max_position_embeddings=2 * 10**9)
    plan = plan_cache(spec, request(), CPU)
    assert 1000 < plan.max_model_len < 2**28 / (BLOCK_BYTES / 16)
    assert len(plan.notes) == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_failed_allocations_are_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize("max_model_len", [None, 1000])
def test_the_context_is_fitted_to_a_small_pool_with_a_note(max_model_len):
    plan = plan_cache(SPEC, request(kv_cache_memory=11 * BLOCK_BYTES, max_model_len=max_model_len), CPU)
    assert plan.max_model_len == 10 * 16
    assert len(plan.notes) == 1
    assert "limited to that instead of" in plan.notes[0]
    assert "\n" not in plan.notes[0]


def test_a_pool_too_small_to_serve_says_how_much_is_needed():
    with pytest.raises(ModelError, match=r"give at least 0\.1 MiB"):
        plan_cache(SPEC, request(kv_cache_memory=4 * BLOCK_BYTES), CPU)
    plan = plan_cache(SPEC, request(kv_cache_memory=2 * BLOCK_BYTES, max_model_len=16), CPU)
    assert plan.usable_blocks == [1]


def test_too_little_free_memory_says_what_to_change(monkeypatch):
    monkeypatch.setattr(memory, "available_cpu_bytes", lambda: 10**5)
    with pytest.raises(ModelError, match="free some memory, or choose a smaller model or dtype"):
        plan_cache(SPEC, request(), CPU)


def test_the_pool_is_a_share_of_the_free_memory(monkeypatch):
    free = 10 * 2**20
    monkeypatch.setattr(memory, "available_cpu_bytes", lambda: free)
    plan = plan_cache(SPEC, request(max_num_seqs=64), CPU)
    assert 0 < plan.kv_cache_bytes <= free // 2


@pytest.mark.parametrize(("length", "message"), [(0, "at least 1"), (1025, "exceeds the 1024 positions")])
def test_impossible_context_lengths_are_refused(length, message):
    with pytest.raises(ModelError, match=message):
        plan_cache(SPEC, request(max_model_len=length), CPU)


def test_control_group_limits_count(tmp_path: Path):
    assert memory._cgroup_available(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("500\n")
    assert memory._cgroup_available(tmp_path) is None
    (tmp_path / "memory.max").write_text("2000\n")
    assert memory._cgroup_available(tmp_path) == 1500
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100\n")
    assert memory._cgroup_available(tmp_path) == 1600


def test_version_1_control_groups_count(tmp_path: Path):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("1000\n")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("400\n")
    (tmp_path / "memory/memory.stat").write_text("inactive_file 5\ntotal_inactive_file 50\n")
    assert memory._cgroup_available(tmp_path) == 650


def pools_of(*num_blocks: int) -> CachePlan:
    return CachePlan(tuple(PoolPlan(count, None) for count in num_blocks), 100, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pools_are_zero_aligned_and_laid_out_as_promised(dtype):
    (pool,) = allocate_pools(SPEC, pools_of(5), 32, dtype, CPU)
    assert pool.shape == (3, 5, 2, 2, 32, 16)
    assert pool.dtype is dtype
    assert pool.is_contiguous()
    assert pool.data_ptr() % 64 == 0
    assert not pool.any()


def test_a_large_pool_costs_nothing_until_it_is_used():
    """32 GiB of zeros: more than many a machine has, and none of it touched."""
    before = memory.psutil.Process().memory_info().rss
    (pool,) = allocate_pools(SPEC, pools_of(2**32 // BLOCK_BYTES), 16, torch.float32, CPU)
    assert memory.psutil.Process().memory_info().rss - before < 2**28
    assert pool[0, 0, 0, 0, 0, 0] == 0


def test_each_layer_finds_its_part_of_its_group_s_pool():
    """Layers 0 and 2 have a window, layer 1 has none: its pool comes first."""
    spec = dataclasses.replace(SPEC, windows=(32, 0, 32))
    pools = allocate_pools(spec, pools_of(5, 7), 16, torch.float32, CPU)
    assert [tuple(pool.shape) for pool in pools] == [(1, 5, 2, 2, 16, 16), (2, 7, 2, 2, 16, 16)]
    for group, pool in enumerate(pools):
        for index, layer in enumerate(pool):
            layer.fill_(10 * group + index)
    assert [int(layer[0, 0, 0, 0, 0]) for layer in layers_of(spec, pools)] == [10, 0, 11]
