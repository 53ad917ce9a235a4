"""What a conversation holds as it grows, in layers that see everything and in layers that see a window of 512."""

from __future__ import annotations

from octavo.scheduler.batch import SampledRow
from octavo.scheduler.config import CacheConfig, PoolConfig, SchedulerConfig
from octavo.scheduler.sampling_params import SamplingParams
from octavo.scheduler.scheduler import Scheduler

BLOCK, WINDOW, BUDGET = 32, 512, 512
FULL, WINDOWED = 0, 1


def make(window: int | None) -> Scheduler:
    """Pools large enough that nothing is ever evicted."""
    return Scheduler(
        SchedulerConfig(max_num_seqs=4),
        CacheConfig(block_size=BLOCK),
        pools=[PoolConfig(2000), PoolConfig(2000, window)],
        max_model_len=16384,
        max_num_batched_tokens=BUDGET,
    )


def turn(scheduler: Scheduler, name: str, prompt: list[int], num_tokens: int) -> tuple[list[int], list[int]]:
    """The answer, and the most blocks of each group that were in tables at once."""
    scheduler.add(name, prompt, SamplingParams(max_tokens=num_tokens, ignore_eos=True))
    answer, most = [], [0, 0]
    while scheduler.has_work:
        batch = scheduler.schedule()
        in_use = [group.pool.num_usable - group.pool.num_free for group in scheduler.blocks.groups]
        most = [max(pair) for pair in zip(most, in_use, strict=True)]
        drawn = [SampledRow(row.seq_id, [len(answer) % 97]) for row in batch.rows if row.draws_token]
        for progress in scheduler.update(batch, drawn):
            answer += progress.token_ids
    return answer, most


def converse(window: int | None) -> list[tuple[int, list[int], int]]:
    """Sixteen turns of 384 tokens asked and 128 answered: tokens so far, most blocks in use, tokens found again."""
    scheduler, said, rows = make(window), [], []
    for index in range(16):
        said += [(7 * index + place) % 89 for place in range(384)]
        hits = scheduler.counters.prefix_cache_hits
        answer, most = turn(scheduler, f"turn-{index}", said, 128)
        said += answer
        rows.append((len(said), most, scheduler.counters.prefix_cache_hits - hits))
    return rows


def test_windowed_layers_hold_a_window_and_a_step_however_long_it_gets() -> None:
    for num_tokens, (full, windowed), _ in converse(WINDOW):
        assert full == num_tokens // BLOCK
        # A window and one block more, and while a prompt is computed the blocks of a step.
        assert windowed <= WINDOW // BLOCK + 1 + BUDGET // BLOCK
    assert (num_tokens, full, windowed) == (8192, 256, 29)


def test_without_windows_all_layers_hold_everything() -> None:
    assert converse(None)[-1][:2] == (8192, [256, 256])


def test_every_turn_finds_the_one_before_in_both_kinds_of_layers() -> None:
    """The last token of an answer is never computed, so the block that it ends is not there to be found."""
    windowed = [hits for _, _, hits in converse(WINDOW)]
    assert windowed == [hits for _, _, hits in converse(None)]
    assert windowed == [0] + [512 * turn - BLOCK for turn in range(1, 16)]
