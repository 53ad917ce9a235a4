"""Who gets which part of a step, who waits, who is preempted: single situations, spelled out."""

from __future__ import annotations

import pytest
from octavo.block_manager.check import check
from octavo.block_manager.hashing import BlockHashes
from octavo.scheduler.batch import SampledRow, ScheduledBatch
from octavo.scheduler.config import CacheConfig, PoolConfig, SchedulerConfig
from octavo.scheduler.progress import Progress, WaitingCounts
from octavo.scheduler.request import RequestStatus
from octavo.scheduler.sampling_params import InvalidRequest, SamplingParams
from octavo.scheduler.scheduler import QueueFull, Scheduler

EOS = 99


def make(
    *,
    num_blocks: int = 65,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 16,
    max_waiting: int = 100,
    caching: bool = False,
) -> Scheduler:
    return Scheduler(
        SchedulerConfig(max_num_seqs=max_num_seqs, max_num_waiting=max_waiting),
        CacheConfig(block_size=block_size, enable_prefix_caching=caching),
        pools=[PoolConfig(num_blocks)],
        max_model_len=(num_blocks - 1) * block_size,
        max_num_batched_tokens=budget,
        eos_token_ids=(EOS,),
        clock=lambda: 0.0,
    )


def step(scheduler: Scheduler, token: int = 5) -> tuple[ScheduledBatch, list[Progress]]:
    batch = scheduler.schedule()
    sampled = [SampledRow(row.seq_id, [token]) for row in batch.rows if row.draws_token]
    return batch, scheduler.update(batch, sampled)


def shares(batch: ScheduledBatch) -> dict[str, int]:
    return {row.seq_id: row.num_scheduled_tokens for row in batch.rows}


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    scheduler = make(budget=16)
    scheduler.add("a", list(range(40)), SamplingParams(max_tokens=2))
    assert [shares(step(scheduler)[0])["a/0"] for _ in range(4)] == [16, 16, 8, 1]
    assert not scheduler.has_work


def test_decodes_go_first_and_a_long_prompt_takes_what_is_left() -> None:
    scheduler = make(budget=16)
    scheduler.add("short", [1, 2, 3], SamplingParams(max_tokens=50))
    step(scheduler)
    scheduler.add("long", list(range(60)), SamplingParams(max_tokens=5))
    for _ in range(4):
        batch, progress = step(scheduler)
        assert batch.rows[0].seq_id == "short/0"
        assert batch.num_decode_rows == 1
        assert shares(batch)["long/0"] == 15
        assert any(item.request.request_id == "short" for item in progress)


def test_the_queue_is_served_by_priority_then_arrival() -> None:
    scheduler = make(max_num_seqs=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 0), ("d", -1)):
        scheduler.add(name, [1, 2], SamplingParams(max_tokens=1), priority=priority)
    order = []
    while scheduler.has_work:
        order += [item.request.request_id for item in step(scheduler)[1]]
    assert order == ["d", "b", "c", "a"]


def test_nobody_overtakes_a_large_request() -> None:
    scheduler = make(num_blocks=9, budget=64)
    scheduler.add("running", [1] * 16, SamplingParams(max_tokens=4))
    step(scheduler)
    scheduler.add("large", [1] * 24, SamplingParams(max_tokens=2))
    scheduler.add("small", [1, 1], SamplingParams(max_tokens=2))
    started = []
    while scheduler.has_work:
        batch, _ = step(scheduler)
        started += [name for name in shares(batch) if name not in started]
    assert started == ["running/0", "large/0", "small/0"]


def test_the_victim_is_the_one_that_loses_least() -> None:
    scheduler = make(num_blocks=9, budget=64)
    scheduler.add("old", [1] * 15, SamplingParams(max_tokens=12))
    scheduler.add("new", [1] * 7, SamplingParams(max_tokens=12))
    while scheduler.counters.num_preemptions == 0:
        step(scheduler)
    assert [request.request_id for request in scheduler.running] == ["old"]
    assert scheduler.num_waiting == 1
    outputs: dict[str, int] = {}
    while scheduler.has_work:
        for item in step(scheduler)[1]:
            outputs[item.request.request_id] = item.request.num_output_tokens
    assert outputs == {"old": 12, "new": 12}
    assert scheduler.counters.num_recomputed_tokens > 0


def test_the_less_important_is_preempted_whatever_it_loses() -> None:
    scheduler = make(num_blocks=9, budget=64)
    scheduler.add("background", [1] * 15, SamplingParams(max_tokens=12), priority=5)
    scheduler.add("urgent", [1] * 7, SamplingParams(max_tokens=12), priority=0)
    while scheduler.counters.num_preemptions == 0:
        step(scheduler)
    assert [request.request_id for request in scheduler.running] == ["urgent"]


def test_a_full_queue_refuses_and_seats_do_not_count_as_queue() -> None:
    scheduler = make(max_num_seqs=2, max_waiting=1)
    for name in ("a", "b", "c"):
        scheduler.add(name, [1], SamplingParams(max_tokens=9))
    with pytest.raises(QueueFull):
        scheduler.add("d", [1], SamplingParams(max_tokens=9))
    step(scheduler)
    assert (len(scheduler.running), scheduler.num_waiting) == (2, 1)
    with pytest.raises(QueueFull):
        scheduler.add("d", [1], SamplingParams(max_tokens=9))


def test_samples_share_the_prompt_and_end_one_by_one() -> None:
    scheduler = make()
    scheduler.add("a", list(range(6)), SamplingParams(n=3, max_tokens=3))
    step(scheduler)
    assert {request.seq_id for request in scheduler.running} == {"a/0", "a/1", "a/2"}
    assert scheduler.blocks.counts().num_shared == 2
    batch, _ = step(scheduler)
    assert shares(batch) == {"a/0": 1, "a/1": 1, "a/2": 1}
    # The second block is partial: two of the three that write into it get a copy.
    assert len(batch.block_copies) == 2
    assert len({row.seed for row in batch.rows}) == 3
    scheduler.abort("a", 1)
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.blocks.num_free_blocks == [64]


def test_aborting_the_leader_lets_its_siblings_go_on() -> None:
    scheduler = make(budget=4)
    scheduler.add("a", list(range(10)), SamplingParams(n=2, max_tokens=2))
    step(scheduler)
    scheduler.abort("a", 0)
    seen = set()
    while scheduler.has_work:
        seen |= {item.request.seq_id for item in step(scheduler)[1]}
    assert seen == {"a/1"}


@pytest.mark.parametrize(
    ("params", "tokens", "reason", "count"),
    [
        (SamplingParams(max_tokens=9), [5, 6, EOS, 7], "stop", 3),
        (SamplingParams(max_tokens=3, ignore_eos=True), [EOS, EOS, EOS], "length", 3),
        (SamplingParams(max_tokens=9, min_tokens=2), [EOS, EOS], "stop", 2),
        (SamplingParams(max_tokens=9, stop_token_ids=(6,)), [5, 6], "stop", 2),
    ],
)
def test_token_level_stops(params: SamplingParams, tokens: list[int], reason: str, count: int) -> None:
    scheduler = make()
    scheduler.add("a", [1], params)
    last = None
    for token in tokens:
        if scheduler.has_work:
            (last,) = step(scheduler, token)[1]
    assert last is not None
    assert last.stop is not None
    assert last.stop.reason == reason
    assert last.request.num_output_tokens == count


def test_a_request_ends_at_the_context_limit() -> None:
    scheduler = make(num_blocks=5)
    scheduler.add("a", [1] * 10, SamplingParams())
    while scheduler.has_work:
        _, progress = step(scheduler)
    assert progress[0].stop is not None
    assert progress[0].request.num_tokens == 16


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", True),
        ("min_p", 2.0),
        ("n", 0),
        ("presence_penalty", 3.0),
        ("frequency_penalty", float("inf")),
        ("repetition_penalty", 0.0),
        ("logit_bias", {3: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("logprobs", 21),
        ("stop", ("",)),
        ("stop", ("x" * 2000,)),
        ("stop_token_ids", (-1,)),
        ("seed", 2**63),
    ],
)
def test_sampling_params_name_the_field_that_is_wrong(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as error:
        SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert error.value.param == field
    assert field in error.value.message or field == "stop"


def test_limits_of_the_model_are_checked_apart() -> None:
    with pytest.raises(InvalidRequest, match="outside the vocabulary"):
        SamplingParams(logit_bias={100: 1.0}).check_against(vocab_size=100, max_num_seqs=4)
    with pytest.raises(InvalidRequest, match="limit of 4"):
        SamplingParams(n=5).check_against(vocab_size=100, max_num_seqs=4)
    with pytest.raises(InvalidRequest, match="must not exceed"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    scheduler = make(num_blocks=1025, budget=128)
    scheduler.add("long", [1] * 3000, SamplingParams(max_tokens=2))
    assert shares(step(scheduler)[0]) == {"long/0": 128}
    scheduler.add("short", [1] * 40, SamplingParams(max_tokens=2))
    batch, progress = step(scheduler)
    assert shares(batch) == {"long/0": 88, "short/0": 40}
    assert [item.request.request_id for item in progress] == ["short"]


def test_prompts_that_fit_are_not_cut_up() -> None:
    scheduler = make(num_blocks=257, budget=128)
    for index in range(4):
        scheduler.add(f"r{index}", [1] * 50, SamplingParams(max_tokens=2))
    assert shares(step(scheduler)[0]) == {"r0/0": 50, "r1/0": 50, "r2/0": 28}
    assert shares(step(scheduler)[0]) == {"r0/0": 1, "r1/0": 1, "r2/0": 22, "r3/0": 50}


def test_siblings_inherit_the_hash_chain_and_count_no_hits() -> None:
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=2),
        CacheConfig(block_size=4),
        pools=[PoolConfig(65)],
        max_model_len=64,
        max_num_batched_tokens=64,
    )
    scheduler.add("a", list(range(13)), SamplingParams(n=4, max_tokens=3))
    step(scheduler)
    for sample in scheduler.requests["a"].values():
        assert len(sample.block_hashes.hashes) == 3
    cached = set()
    while scheduler.has_work:
        cached |= {item.request.num_cached_tokens for item in step(scheduler)[1]}
    assert cached == {0}
    assert (scheduler.counters.prefix_cache_queries, scheduler.counters.prefix_cache_hits) == (13, 0)


def test_who_lacks_a_seat_waits_for_capacity() -> None:
    scheduler = make(max_num_seqs=2)
    for name in ("a", "b", "c", "d"):
        scheduler.add(name, [1, 2], SamplingParams(max_tokens=2))
    step(scheduler)
    assert scheduler.waiting_counts == WaitingCounts(num_for_capacity=2, num_deferred=0)
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.waiting_counts == WaitingCounts(0, 0)


def test_who_lacks_blocks_waits_for_capacity() -> None:
    scheduler = make(num_blocks=9, budget=64)
    scheduler.add("a", [1] * 16, SamplingParams(max_tokens=4))
    scheduler.add("b", [1] * 24, SamplingParams(max_tokens=4))
    step(scheduler)
    assert scheduler.waiting_counts == WaitingCounts(num_for_capacity=1, num_deferred=0)


def test_who_is_preempted_waits_for_capacity() -> None:
    scheduler = make(num_blocks=9, budget=64)
    scheduler.add("a", [1] * 15, SamplingParams(max_tokens=12))
    scheduler.add("b", [1] * 7, SamplingParams(max_tokens=12))
    while scheduler.counters.num_preemptions == 0:
        step(scheduler)
    assert scheduler.waiting_counts == WaitingCounts(num_for_capacity=1, num_deferred=0)


def test_who_lacks_only_the_step_s_tokens_is_deferred() -> None:
    scheduler = make(budget=64)
    for name in ("a", "b", "c"):
        scheduler.add(name, [1] * 64, SamplingParams(max_tokens=2))
    assert shares(step(scheduler)[0]) == {"a/0": 64}
    assert scheduler.waiting_counts == WaitingCounts(num_for_capacity=0, num_deferred=2)


def test_a_held_sample_is_deferred_while_its_leader_computes_the_prompt() -> None:
    scheduler = make(budget=8, max_num_seqs=1)
    scheduler.add("a", [1] * 16, SamplingParams(n=3, max_tokens=2))
    scheduler.add("b", [1], SamplingParams(n=2, max_tokens=2))
    step(scheduler)
    # Both samples of "b": one without a seat, one held behind it.
    assert scheduler.waiting_counts == WaitingCounts(num_for_capacity=2, num_deferred=2)
    step(scheduler)
    assert scheduler.waiting_counts == WaitingCounts(num_for_capacity=4, num_deferred=0)


def prefix_counts(scheduler: Scheduler) -> tuple[int, int, int, int, int]:
    """Queries, hits, and misses: new, evicted, tail."""
    counters = scheduler.counters
    misses = (counters.prefix_misses_new, counters.prefix_misses_evicted, counters.prefix_misses_tail)
    return counters.prefix_cache_queries, counters.prefix_cache_hits, *misses


def test_hits_and_misses_are_counted_once_per_request_in_tokens() -> None:
    scheduler = make(num_blocks=6, budget=64, caching=True)
    expected = [
        ([1] * 10, (10, 0, 8, 0, 2)),
        ([1] * 10, (20, 8, 8, 0, 4)),
        ([2] * 20, (40, 8, 24, 0, 8)),  # takes the whole pool
        ([1] * 10, (50, 8, 24, 8, 10)),
    ]
    for index, (prompt, counts) in enumerate(expected):
        scheduler.add(f"r{index}", prompt, SamplingParams(max_tokens=1, n=1))
        while scheduler.has_work:
            step(scheduler)
        assert prefix_counts(scheduler) == counts


def test_a_readmission_counts_neither_hits_nor_misses() -> None:
    scheduler = make(num_blocks=9, budget=64, caching=True)
    scheduler.add("a", [1] * 15, SamplingParams(max_tokens=12))
    scheduler.add("b", [2] * 7, SamplingParams(max_tokens=12))
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.counters.num_preemptions > 0
    assert prefix_counts(scheduler) == (22, 0, 16, 0, 6)


def draw(batch: ScheduledBatch, token: int = 5) -> list[SampledRow]:
    return [SampledRow(row.seq_id, [token]) for row in batch.rows if row.draws_token]


def test_what_was_drawn_for_an_aborted_request_is_not_given_to_another_under_its_id() -> None:
    scheduler = make()
    scheduler.add("a", [1, 2, 3], SamplingParams(max_tokens=9))
    in_flight = scheduler.schedule()
    scheduler.abort("a")
    scheduler.add("a", [4, 5, 6, 7, 8], SamplingParams(max_tokens=9))
    assert scheduler.update(in_flight, draw(in_flight)) == []
    (request,) = scheduler.requests["a"].values()
    assert (request.token_ids, request.high_water_tokens) == ([4, 5, 6, 7, 8], 0)
    batch, progress = step(scheduler)
    assert shares(batch) == {"a/0": 5}
    assert [item.token_ids for item in progress] == [[5]]


def test_an_aborted_request_s_row_is_not_held_or_taken_back_by_another_under_its_id() -> None:
    scheduler = make()
    scheduler.add("a", [1, 2, 3], SamplingParams(max_tokens=9))
    old = scheduler.schedule()
    scheduler.abort("a")
    scheduler.add("a", [1, 2, 3], SamplingParams(max_tokens=9))
    new = scheduler.schedule()
    scheduler.retract(old)
    scheduler.drop_row(old.rows[0])
    assert (scheduler.holds(old.rows[0]), scheduler.holds(new.rows[0])) == (False, True)
    (request,) = scheduler.requests["a"].values()
    assert (request.num_computed_tokens, request.num_drawing_tokens) == (3, 1)


def preempted() -> tuple[Scheduler, list[int], ScheduledBatch]:
    """A scheduler that has just preempted a request with this prompt, whose row was in the batch before."""
    scheduler = make(num_blocks=9, budget=64, caching=True)
    scheduler.add("old", [1] * 15, SamplingParams(max_tokens=12))
    scheduler.add("victim", [2] * 7, SamplingParams(max_tokens=12))
    before = scheduler.schedule()
    drawn = draw(before)
    while True:
        after = scheduler.schedule()  # one step ahead
        if scheduler.counters.num_preemptions:
            assert scheduler.requests["victim"][0].status is RequestStatus.WAITING
            scheduler.retract(after)
            return scheduler, [2] * 7, before
        drawn, so_far = draw(after), drawn
        scheduler.update(before, so_far)
        before = after


def num_found(scheduler: Scheduler, prompt: list[int]) -> int:
    return scheduler.blocks.match(BlockHashes(scheduler.blocks.block_size), prompt).num_tokens


def test_what_a_preempted_sample_of_a_failed_request_published_is_not_found_again() -> None:
    scheduler, prompt, _ = preempted()
    assert num_found(scheduler, prompt) == 4
    scheduler.fail("victim/0")
    assert num_found(scheduler, prompt) == 0
    check(scheduler.blocks)


def test_what_a_sequence_published_that_was_preempted_in_a_step_that_failed_is_not_found_again() -> None:
    """It may be what made the step fail, and cannot be tried alone: its blocks are others' by now."""
    scheduler, prompt, failed = preempted()
    (row,) = (row for row in failed.rows if row.seq_id == "victim/0")
    assert not scheduler.holds(row)
    scheduler.drop_row(row)
    assert num_found(scheduler, prompt) == 0


def test_a_sequence_that_was_preempted_in_a_step_that_failed_is_served_all_the_same() -> None:
    scheduler, _, failed = preempted()
    for row in failed.rows:
        if not scheduler.holds(row):
            scheduler.drop_row(row)
    rest = ScheduledBatch([row for row in failed.rows if scheduler.holds(row)], 1).known()
    scheduler.update(rest, draw(rest))
    outputs = {"old": 0, "victim": 0}
    for _ in range(100):
        for item in step(scheduler)[1]:
            outputs[item.request.request_id] = item.request.num_output_tokens
    assert outputs == {"old": 12, "victim": 12}


def test_a_leader_that_forks_late_with_tokens_left_to_compute_writes_no_shared_block() -> None:
    """Preempted twice while its token was being drawn, it has two outputs when its prompt is there to be shared."""
    scheduler = make(budget=11)
    scheduler.add("a", [1] * 10, SamplingParams(n=2, max_tokens=9))
    for _ in range(2):
        batch = scheduler.schedule()
        scheduler._preempt(scheduler.running[0])
        scheduler.update(batch, draw(batch))
    scheduler.add("b", [1], SamplingParams(max_tokens=9), priority=-1)
    assert shares(step(scheduler)[0]) == {"b/0": 1, "a/0": 10}
    assert scheduler.blocks.counts().num_shared > 0
    batch = scheduler.schedule()
    assert shares(batch)["a/0"] == 2
    written = [row.block_ids[0][row.num_computed_tokens // 4] for row in batch.rows]
    assert [scheduler.blocks.groups[0].pool.blocks[block].ref_count for block in written] == [1] * len(written)
