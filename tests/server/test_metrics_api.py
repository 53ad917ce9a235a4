"""What Prometheus sees."""

from __future__ import annotations

import math
import time

import httpx
import pytest
from http_fakes import FakeEngineClient, chat, fails, make_app, metric, says, serving
from octavo.server.engine.messages import StepStats
from octavo.server.metrics import _Histogram, one_two_five
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"


async def scrape(http: httpx.AsyncClient) -> str:
    response = await http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return response.text


async def test_every_documented_name_is_there(http: httpx.AsyncClient) -> None:
    await http.post(CHAT, json=chat(max_tokens=5))
    text = await scrape(http)
    names = {family.name for family in text_string_to_metric_families(text)}
    expected = """
        num_requests_running num_requests_waiting num_requests_waiting_by_reason kv_cache_usage_perc cache_config_info
        prefix_cache_queries prefix_cache_hits num_preemptions prompt_tokens prompt_tokens_by_source
        prompt_tokens_cached generation_tokens request_success admission_rejections e2e_request_latency_seconds
        request_queue_time_seconds request_inference_time_seconds request_prefill_time_seconds
        request_decode_time_seconds time_to_first_token_seconds inter_token_latency_seconds
        request_time_per_output_token_seconds request_prompt_tokens request_generation_tokens
        request_max_num_generation_tokens request_params_max_tokens request_prefill_kv_computed_tokens
        iteration_tokens_total request_params_n request_num_preemptions recomputed_tokens kv_blocks step_seconds
        engine_restarts engine_last_message_age_seconds
    """
    assert {f"octavo:{name}" for name in expected.split()} <= names
    assert {"http_requests", "http_request_duration_seconds"} <= names


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
    now = time.monotonic()
    metrics.recent_ends.extend(now - 10 + second for second in range(10))  # one a second
    for num_waiting, least in ((0, 1), (20, 20), (1000, 60)):
        engine.stats_listeners[0](StepStats(num_waiting=num_waiting))
        assert least <= metrics.drain_seconds() <= 60
    monkeypatch.setattr(metrics, "drain_seconds", lambda: 17)
    assert (await http.post(CHAT, json=chat())).headers["retry-after"] == "17"


async def test_prefix(engine: FakeEngineClient) -> None:
    async with serving(make_app(engine, metrics_prefix="vllm:")) as http:
        assert metric(await scrape(http), "vllm:num_requests_running", model_name="fake", engine="0") == 0
    with pytest.raises(ValueError, match="prefix"):
        make_app(engine, metrics_prefix="a b")


def test_one_two_five() -> None:
    assert one_two_five(300) == (1, 2, 5, 10, 20, 50, 100, 200)
    assert one_two_five(0) == (1,)


def test_histogram_buckets_are_cumulative_and_inclusive() -> None:
    histogram = _Histogram("h", "d", ("a",), (1, 2))
    cells = histogram.labels("x")
    cells.observe(1)
    cells.observe(1.5, 3)
    cells.observe(math.inf)
    (family,) = histogram.collect()
    found = {sample.labels.get("le", sample.name): sample.value for sample in family.samples}
    assert (found["1.0"], found["2.0"], found["+Inf"], found["h_count"]) == (1, 4, 5, 5)
