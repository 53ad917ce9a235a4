"""Both ways of generating, on a tiny model in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
from octavo.model.config import ModelConfig
from octavo.scheduler.config import CacheConfig, SchedulerConfig
from octavo.scheduler.sampling_params import SamplingParams
from octavo.server.bench.kv_cache import cached_work, recompute_work
from octavo.server.bench.kv_cache_engine import BenchEngine, UncountedWork
from octavo.server.bench.kv_cache_measure import Settings, measure
from octavo.server.config import EngineConfig
from octavo.server.engine.messages import GenerateRequest

PROMPT = [5, 77, 210, 3, 3, 91, 18, 250, 4, 66, 12, 9, 300, 41, 7, 8, 19]


def engine_config(folder: Path, *, dtype: str = "float32", prefix_caching: bool = False) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(path=str(folder), dtype=dtype, device="cpu", max_model_len=96),  # type: ignore[arg-type]
        cache=CacheConfig(block_size=16, enable_prefix_caching=prefix_caching),
        scheduler=SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=96),
    )


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> BenchEngine:
    return BenchEngine(engine_config(tiny_checkpoint))


def test_both_ways_give_the_same_tokens_for_the_counted_work(engine: BenchEngine) -> None:
    cached = engine.generate_cached(PROMPT, 20)
    recomputed = engine.generate_recomputed(PROMPT, cached.token_ids)
    assert len(cached.token_ids) == 20
    assert recomputed.token_ids == cached.token_ids
    assert cached.work == cached_work(len(PROMPT), 20)
    assert recomputed.work == recompute_work(len(PROMPT), 20)
    assert len(cached.token_seconds) == len(recomputed.token_seconds) == 20
    assert all(seconds > 0 for seconds in cached.token_seconds + recomputed.token_seconds)


def test_recomputing_goes_on_with_the_forced_tokens(engine: BenchEngine) -> None:
    cached = engine.generate_cached(PROMPT, 4)
    forced = [cached.token_ids[0], (cached.token_ids[1] + 1) % 320, 17, 23]
    recomputed = engine.generate_recomputed(PROMPT, forced)
    assert recomputed.token_ids[:2] == cached.token_ids[:2]
    assert recomputed.token_ids[2] == engine.generate_cached([*PROMPT, *forced[:2]], 1).token_ids[0]


def test_a_measurement_covers_every_prompt_and_repeat(engine: BenchEngine) -> None:
    notes: list[str] = []
    settings = Settings(prompt_lengths=[3, 40], num_output=6, num_repeats=2, seed=1)
    results = measure(engine, settings, notes.append)
    assert [result.num_prompt for result in results] == [3, 40]
    assert len(notes) == 4
    for result in results:
        assert (len(result.cached), len(result.recomputed)) == (2, 2)
        assert result.partings == []
        assert result.num_agreeing == result.num_output == 6


def test_float32_excuses_no_difference(engine: BenchEngine) -> None:
    forced = engine.generate_cached(PROMPT, 5).token_ids
    (parting,) = engine.explain(PROMPT, forced, {3: (forced[3] + 1) % 320})
    assert (parting.index, parting.cached_token) == (3, forced[3])
    assert not parting.near_tie


def test_a_gap_is_the_distance_of_log_probabilities_and_bfloat16_excuses_a_small_one(tiny_checkpoint: Path) -> None:
    engine = BenchEngine(engine_config(tiny_checkpoint, dtype="bfloat16"))
    forced = engine.generate_cached(PROMPT, 1).token_ids
    listed = engine._ask(PROMPT, 1, logprobs=20).logprobs[0]
    for rank in (2, 20):
        (parting,) = engine.explain(PROMPT, forced, {0: listed.token_ids[rank]})
        assert parting.gap == pytest.approx(listed.logprobs[0] - listed.logprobs[rank])
        assert parting.gap is not None
        assert parting.near_tie == (parting.gap <= 0.25)
    unlisted = next(token_id for token_id in range(320) if token_id not in listed.token_ids)
    (parting,) = engine.explain(PROMPT, forced, {0: unlisted})
    assert (parting.gap, parting.near_tie) == (None, False)


def test_prefix_caching_is_refused(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="prefix caching"):
        BenchEngine(engine_config(tiny_checkpoint, prefix_caching=True))


def test_work_of_somebody_else_in_the_engine_is_noticed(tiny_checkpoint: Path) -> None:
    engine = BenchEngine(engine_config(tiny_checkpoint))
    other = GenerateRequest(
        request_id="other", prompt_token_ids=[1, 2, 3], params=SamplingParams(max_tokens=1), arrival_time=1.0
    )
    engine._client.submit(other)
    with pytest.raises(UncountedWork, match="computed"):
        engine.generate_cached(PROMPT, 2)
