"""What Prometheus sees."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from http_fakes import FIRST_TIMINGS, READY, FakeEngineClient, chat, events, fails, make_app, metric, says, serving
from octavo.server.engine.client import EngineState
from octavo.server.engine.messages import StepStats
from octavo.server.histogram import Histogram, one_two_five
from octavo.server.metric_catalog import REJECTION_REASONS
from octavo.server.metrics import Metrics

pytestmark = pytest.mark.anyio
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


async def scrape(http: httpx.AsyncClient) -> str:
    response = await http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return response.text


async def test_a_request_s_numbers(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    engine.script = says("Hello", cached=16)
    await http.post(CHAT, json=chat(max_tokens=50, n=2))
    text = await scrape(http)
    own = {"model_name": "fake", "engine": "0"}
    num_prompt = len("[user]hi[assistant]") + 1
    assert metric(text, "octavo:request_success_total", finished_reason="stop", **own) == 2
    assert metric(text, "octavo:prompt_tokens_total", **own) == num_prompt
    assert metric(text, "octavo:prompt_tokens_cached_total") == 16
    assert metric(text, "octavo:prompt_tokens_by_source_total", source="local_compute") == num_prompt - 16
    assert metric(text, "octavo:generation_tokens_total") == 12
    assert metric(text, "octavo:time_to_first_token_seconds_count") == 2
    assert metric(text, "octavo:inter_token_latency_seconds_count") == 10
    assert metric(text, "octavo:request_generation_tokens_sum") == 12
    assert metric(text, "octavo:request_queue_time_seconds_sum") == 2 * 1
    assert metric(text, "octavo:request_prefill_time_seconds_sum") == 2 * 2
    assert metric(text, "octavo:request_decode_time_seconds_sum") == 2 * 4
    assert metric(text, "octavo:request_inference_time_seconds_sum") == 2 * 6
    assert metric(text, "octavo:request_time_per_output_token_seconds_sum") == pytest.approx(2 * 4 / 5)
    assert metric(text, "octavo:request_params_n_sum") == 2
    assert metric(text, "octavo:request_params_max_tokens_sum") == 50
    assert metric(text, "octavo:kv_cache_usage_perc") == 0.4
    states = {state: metric(text, "octavo:kv_blocks", state=state) for state in ("free", "cached", "active", "shared")}
    assert states == {"free": 40, "cached": 20, "active": 30, "shared": 10}
    assert metric(text, "octavo:step_seconds_total", phase="forward") == 6 * 0.25
    assert metric(text, "octavo:cache_config_info", block_size="16", num_gpu_blocks="100") == 1


async def test_http_metrics_use_route_templates(http: httpx.AsyncClient) -> None:
    for path in ("/v1/models/fake", "/v1/models/made/up", "/nope/1", "/nope/2", "/health", "/metrics"):
        await http.get(path)
    await http.request("BREW", "/v1/models")
    text = await scrape(http)
    assert metric(text, "http_requests_total", handler="/v1/models/{id:path}", method="GET", status="2xx") == 1
    assert metric(text, "http_requests_total", handler="/v1/models/{id:path}", status="4xx") == 1
    assert metric(text, "http_requests_total", handler="none", status="4xx") == 2
    assert metric(text, "http_request_duration_seconds_count", handler="none") == 2
    for absent in ("/nope", "made/up", "BREW", 'handler="/health"', 'handler="/metrics"'):
        assert absent not in text


async def test_errors_aborts_and_rejections(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    for code in ("internal_error", "queue_full"):
        engine.script = fails(code)
        await http.post(CHAT, json=chat())
    await http.post(CHAT, json=chat(max_tokens=10_000))
    await http.post(CHAT, json=chat(n=9))
    engine.script = says("a STOP b")
    await http.post(CHAT, json=chat(stop="STOP"))
    text = await scrape(http)
    for reason in ("queue_full", "context_length_exceeded", "invalid_request"):
        assert metric(text, "octavo:admission_rejections_total", reason=reason) == 1, reason
    assert metric(text, "octavo:request_success_total", finished_reason="error") == 1
    assert metric(text, "octavo:request_success_total", finished_reason="stop") == 1
    assert metric(text, "octavo:request_success_total", finished_reason="abort") == 0


def rejections(text: str) -> dict[str, float]:
    """Reason → count, of those that happened."""
    counts = {reason: metric(text, "octavo:admission_rejections_total", reason=reason) for reason in REJECTION_REASONS}
    return {reason: count for reason, count in counts.items() if count}


@pytest.mark.parametrize(
    ("reason", "url", "body"),
    [
        ("invalid_request", CHAT, chat(temperature="hot")),  # pydantic
        ("invalid_request", CHAT, chat(temperature=-1)),  # SamplingParams
        ("invalid_request", CHAT, chat(echo=True)),
        ("invalid_request", CHAT, []),
        ("invalid_request", TEXT, {"prompt": ["a"] * 1000}),
        ("invalid_request", TEXT, {"prompt": [[1], [259]]}),
        ("invalid_request", TEXT, {"prompt": [[1], [2], [259]], "stream": True}),
        ("context_length_exceeded", CHAT, chat(max_tokens=10_000)),
        ("context_length_exceeded", TEXT, {"prompt": [[1], [2] * 600], "max_tokens": 1}),
        ("model_not_found", CHAT, chat(model="gpt")),
    ],
)
async def test_what_is_turned_down_is_counted_once(
    http: httpx.AsyncClient, reason: str, url: str, body: object
) -> None:
    assert (await http.post(url, json=body)).status_code in (400, 404)
    text = await scrape(http)
    assert rejections(text) == {reason: 1}
    for ended in ("abort", "error", "stop"):
        assert metric(text, "octavo:request_success_total", finished_reason=ended) == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("refused", [{"-2"}, {"-0", "-1", "-2"}])
async def test_a_full_queue_is_counted_once_for_all_prompts(
    http: httpx.AsyncClient, engine: FakeEngineClient, refused: set[str], stream: bool
) -> None:
    engine.script = lambda request: fails("queue_full")(request) if request.request_id[-2:] in refused else []
    body = {"prompt": ["a", "b", "c"], "n": 2, "stream": stream}
    assert (await http.post(TEXT, json=body)).status_code == 429
    text = await scrape(http)
    assert rejections(text) == {"queue_full": 1}
    for ended in ("abort", "error", "stop"):
        assert metric(text, "octavo:request_success_total", finished_reason=ended) == 0


async def test_a_full_queue_after_the_first_output_is_an_error(
    http: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.script = fails("queue_full", after="Hel")
    assert "error" in events((await http.post(TEXT, json={"prompt": "a", "stream": True})).text)[-1]
    text = await scrape(http)
    assert rejections(text) == {}
    assert metric(text, "octavo:request_success_total", finished_reason="error") == 1


async def test_unavailability_is_counted_for_generation_only(engine: FakeEngineClient) -> None:
    app = make_app(engine)
    async with serving(app) as http:
        engine.die("x")
        for url, body in ((CHAT, chat()), (TEXT, {"prompt": "a"}), ("/tokenize", {"prompt": "a", "model": "x"})):
            assert (await http.post(url, json=body)).status_code >= 400
        app.state.server.draining = True
        assert (await http.post(CHAT, json=chat())).status_code == 503
        assert rejections(await scrape(http)) == {"unavailable": 3}


async def test_a_lost_engine_is_no_rejection(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    engine.script = fails("engine_dead")
    assert (await http.post(CHAT, json=chat())).status_code == 503
    text = await scrape(http)
    assert rejections(text) == {}
    assert metric(text, "octavo:request_success_total", finished_reason="error") == 1


@pytest.mark.parametrize("per_step", [1, 3, 100])
async def test_a_stop_string_leaves_no_histogram_out(
    http: httpx.AsyncClient, engine: FakeEngineClient, per_step: int
) -> None:
    engine.script = says("a STOP b", per_step=per_step)
    before = time.monotonic()
    await http.post(CHAT, json=chat(stop="STOP", n=2))
    text = await scrape(http)
    for name in ("queue", "prefill", "decode", "inference"):
        assert metric(text, f"octavo:request_{name}_time_seconds_count") == 2, name
    assert metric(text, "octavo:request_num_preemptions_count") == 2
    assert metric(text, "octavo:request_time_per_output_token_seconds_count") == 2
    assert metric(text, "octavo:request_queue_time_seconds_sum") == 2 * 1
    assert metric(text, "octavo:request_prefill_time_seconds_sum") == 2 * 2
    if per_step < 100:  # else the engine had ended them, and said when
        least = 2 * (before - FIRST_TIMINGS.first_token)
        assert least <= metric(text, "octavo:request_decode_time_seconds_sum") <= least + 60


async def test_dead_engine_and_restarts(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    engine.stats_listeners[0](StepStats(num_running=3, num_waiting=4, num_blocks=10, num_free_blocks=5))
    text = await scrape(http)
    assert metric(text, "octavo:num_requests_running") == 3
    assert metric(text, "octavo:num_requests_waiting_by_reason", reason="capacity") == 4
    engine.die("x")
    engine.num_restarts = 2
    for _ in range(2):
        text = await scrape(http)
        assert metric(text, "octavo:num_requests_running") == 0
        assert metric(text, "octavo:engine_restarts_total") == 2


async def test_retry_after_follows_the_drain_rate(
    http: httpx.AsyncClient, engine: FakeEngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = engine.stats_listeners[0].__self__  # type: ignore[attr-defined]
    engine.script = fails("queue_full")
    assert (await http.post(CHAT, json=chat())).headers["retry-after"] == "1"
    monkeypatch.setattr(metrics, "drain_seconds", lambda: 17)
    assert (await http.post(CHAT, json=chat())).headers["retry-after"] == "17"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that the metrics see, in `now`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("octavo.server.drain.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def under_load(metrics: Metrics, clock: Any, seconds: int, *, num_waiting: int, ends_per_second: int) -> None:
    for _ in range(seconds):
        metrics.on_step(StepStats(num_running=8, num_waiting=num_waiting, num_blocks=1))
        clock.now += 1
        for _ in range(ends_per_second):
            metrics.on_end(clock.now)


async def test_idle_time_does_not_lengthen_retry_after(
    http: httpx.AsyncClient, engine: FakeEngineClient, clock: SimpleNamespace
) -> None:
    metrics = engine.stats_listeners[0].__self__  # type: ignore[attr-defined]
    assert metrics.drain_seconds() == 1
    under_load(metrics, clock, 10, num_waiting=0, ends_per_second=1)
    metrics.on_step(StepStats(num_blocks=1))
    clock.now += 10_000  # nobody comes
    under_load(metrics, clock, 10, num_waiting=19, ends_per_second=1)
    assert metrics.drain_seconds() == 20
    under_load(metrics, clock, 1, num_waiting=1000, ends_per_second=1)
    assert metrics.drain_seconds() == 60


async def test_retry_after_counts_from_the_first_that_waited(
    http: httpx.AsyncClient, engine: FakeEngineClient, clock: SimpleNamespace
) -> None:
    metrics = engine.stats_listeners[0].__self__  # type: ignore[attr-defined]
    under_load(metrics, clock, 100, num_waiting=0, ends_per_second=1)  # all that there was to do
    under_load(metrics, clock, 4, num_waiting=99, ends_per_second=10)
    assert metrics.drain_seconds() == 10
    metrics.on_step(StepStats(num_running=8, num_blocks=1))
    under_load(metrics, clock, 7, num_waiting=99, ends_per_second=0)
    assert metrics.drain_seconds() == 7  # nothing has ended: as long again
    under_load(metrics, clock, 1000, num_waiting=99, ends_per_second=5)
    assert 19 <= metrics.drain_seconds() <= 21


async def test_prefix(engine: FakeEngineClient) -> None:
    async with serving(make_app(engine, metrics_prefix="vllm:")) as http:
        assert metric(await scrape(http), "vllm:num_requests_running", model_name="fake", engine="0") == 0
    with pytest.raises(ValueError, match="prefix"):
        make_app(engine, metrics_prefix="a b")


def test_one_two_five() -> None:
    assert one_two_five(300) == (1, 2, 5, 10, 20, 50, 100, 200)
    assert one_two_five(0) == (1,)


def test_histogram_buckets_are_cumulative_and_inclusive() -> None:
    histogram = Histogram((1, 2))
    histogram.observe(1)
    histogram.observe(1.5, 3)
    histogram.observe(7)
    assert list(histogram.cumulative()) == [(1, 1), (2, 4), (math.inf, 5)]
    assert histogram.sum == 12.5


async def test_a_step_s_statistics_are_counted_once_however_often_they_are_read(
    http: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    step = StepStats(
        num_scheduled_tokens=9,
        prefix_cache_queries=100,
        prefix_cache_hits=60,
        prefix_misses_new=20,
        prefix_misses_evicted=15,
        prefix_misses_tail=5,
        num_evicted_blocks=3,
        num_preemptions=2,
        num_recomputed_tokens=7,
        schedule_seconds=0.5,
        sample_seconds=0.125,
        update_seconds=0.25,
        emit_seconds=2.0,
    )
    for _ in range(2):
        engine.stats_listeners[0](step)
    engine.stats_listeners[0](StepStats(emit_seconds=1.0))  # a sign of life that brings the last step's remainder
    for _ in range(2):
        text = await scrape(http)
        assert metric(text, "octavo:prefix_cache_queries_total") == 200
        assert metric(text, "octavo:prefix_cache_hits_total") == 120
        reasons = ("new", "evicted", "tail")
        missed = [metric(text, "octavo:prefix_cache_misses_total", reason=reason) for reason in reasons]
        assert missed == [40, 30, 10]
        assert metric(text, "octavo:kv_blocks_evicted_total") == 6
        assert metric(text, "octavo:num_preemptions_total") == 4
        assert metric(text, "octavo:recomputed_tokens_total") == 14
        assert metric(text, "octavo:engine_steps_total") == 2
        assert metric(text, "octavo:iteration_tokens_total_sum") == 18
        phases = ("schedule", "forward", "sample", "update", "emit")
        seconds = [metric(text, "octavo:step_seconds_total", phase=phase) for phase in phases]
        assert seconds == [1.0, 0, 0.25, 0.5, 5.0]


async def test_the_waiting_are_shown_by_reason(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    engine.stats_listeners[0](StepStats(num_waiting=7, num_waiting_deferred=3))
    text = await scrape(http)
    assert metric(text, "octavo:num_requests_waiting") == 7
    assert metric(text, "octavo:num_requests_waiting_by_reason", reason="capacity") == 4
    assert metric(text, "octavo:num_requests_waiting_by_reason", reason="deferred") == 3


def pid_of_no_process() -> int:
    """The number of one that has ended and been waited for."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        return process.pid


async def test_the_engine_s_memory_is_that_of_its_process(
    http: httpx.AsyncClient, engine: FakeEngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "octavo:engine_resident_memory_bytes"
    assert metric(await scrape(http), name) == 0
    monkeypatch.setattr(FakeEngineClient, "engine_pid", os.getpid())
    assert metric(await scrape(http), name) > 1 << 20
    monkeypatch.setattr(FakeEngineClient, "engine_pid", pid_of_no_process())
    assert metric(await scrape(http), name) == 0


async def test_the_engine_is_up_and_has_a_size_only_while_it_serves(engine: FakeEngineClient) -> None:
    engine._ready_at_start = False
    async with serving(make_app(engine)) as http:

        async def shown() -> list[float]:
            text = await scrape(http)
            names = ("engine_up", "kv_cache_bytes", "model_weights_bytes", "kv_cache_usage_perc")
            return [metric(text, f"octavo:{name}") for name in names]

        assert await shown() == [0, 0, 0, 0]
        engine.handle(READY)
        engine.stats_listeners[0](StepStats(num_blocks=10, num_free_blocks=5, block_usage=0.5))
        assert await shown() == [1, 1000, 1000, 0.5]
        engine._engine_died("it restarts", EngineState.STARTING)
        assert await shown() == [0, 0, 0, 0]
        engine.handle(READY)
        assert await shown() == [1, 1000, 1000, 0]  # nothing of the engine before it
        engine.die("for good")
        assert await shown() == [0, 0, 0, 0]
