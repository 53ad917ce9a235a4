"""Prompts and decodes whose windows share a small pool: single situations, spelled out."""

from __future__ import annotations

import pytest
from octavo.scheduler.batch import SampledRow, ScheduledBatch
from octavo.scheduler.config import CacheConfig, PoolConfig, SchedulerConfig
from octavo.scheduler.held_blocks import HeldBlocks
from octavo.scheduler.progress import Progress, WaitingCounts
from octavo.scheduler.sampling_params import SamplingParams
from octavo.scheduler.scheduler import Scheduler


def draw(batch: ScheduledBatch) -> list[SampledRow]:
    return [SampledRow(row.seq_id, [5]) for row in batch.rows if row.draws_token]


def step(scheduler: Scheduler) -> tuple[ScheduledBatch, list[Progress]]:
    batch = scheduler.schedule()
    return batch, scheduler.update(batch, draw(batch))


def shares(batch: ScheduledBatch) -> dict[str, int]:
    return {row.seq_id: row.num_scheduled_tokens for row in batch.rows}


def test_prompts_whose_windows_fill_a_pool_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Admission promises no more than there is, so they never do; should it ever, some are preempted. Three prompts
    that share each step, in a pool for one window."""
    monkeypatch.setattr(HeldBlocks, "fits", lambda self, request, match, spare: True)
    monkeypatch.setattr(HeldBlocks, "spare", lambda self, running: [1, 1])
    monkeypatch.setattr("octavo.scheduler.budget.MIN_CHUNK", 1)
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=4),
        CacheConfig(block_size=4, enable_prefix_caching=False),
        pools=[PoolConfig(65), PoolConfig(4, 6)],
        max_model_len=64,
        max_num_batched_tokens=8,
    )
    for name in "abc":
        scheduler.add(name, list(range(40)), SamplingParams(max_tokens=1))
    finished = []
    while scheduler.has_work:
        batch, progress = step(scheduler)
        assert batch.rows
        finished += [item.request.request_id for item in progress]
    assert sorted(finished) == ["a", "b", "c"]
    assert scheduler.counters.num_preemptions > 0


def test_a_decode_waits_for_the_step_in_flight_to_give_a_block_back() -> None:
    """Four blocks: a prompt of three, of which the window keeps two, and the next token's. Nobody is preempted."""
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=1),
        CacheConfig(block_size=4, enable_prefix_caching=False),
        pools=[PoolConfig(5, 5)],
        max_model_len=64,
        max_num_batched_tokens=16,
    )
    scheduler.add("a", list(range(16)), SamplingParams(max_tokens=9))
    first = scheduler.schedule()
    assert shares(first) == {"a/0": 16}
    assert scheduler.schedule().rows == []  # the prompt's step still reads all four
    scheduler.update(first, draw(first))
    assert scheduler.blocks.num_free_blocks == [3]
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.counters.num_preemptions == 0
    assert scheduler.blocks.num_free_blocks == [4]


def test_a_prompt_leaves_alone_what_another_was_promised() -> None:
    """The first takes all eight blocks for its part, and will hold three: the second wants eight of its own."""
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=4),
        CacheConfig(block_size=4, enable_prefix_caching=False),
        pools=[PoolConfig(65), PoolConfig(9, 6)],
        max_model_len=64,
        max_num_batched_tokens=64,
    )
    scheduler.add("a", list(range(60)), SamplingParams(max_tokens=2))
    scheduler.add("b", list(range(60)), SamplingParams(max_tokens=2))
    assert "b/0" not in shares(step(scheduler)[0])
    assert scheduler.waiting_counts == WaitingCounts(num_for_capacity=1, num_deferred=0)
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.counters.num_preemptions == 0
