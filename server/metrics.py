"""Prometheus metrics: the only module that touches prometheus_client.

Names, labels and buckets are those of vLLM's dashboards after the prefix (HTTP metrics, as there, have none).
Everything is updated and read on the event loop, so the per-token path takes no locks: see `_Histogram`.
"""

from __future__ import annotations

import math
import re
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ..scheduler.sampling_params import SamplingParams
from .engine.client import EngineClient, EngineState
from .engine.messages import EngineReady, RequestError, RequestTimings, StepStats
from .outputs import TextDelta

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

LATENCY_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
# Below 10 ms ours are finer than vLLM's: small models live there.
ITL_BUCKETS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
ITERATION_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SMALL_COUNT_BUCKETS = (1, 2, 5, 10, 20)
HTTP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

LATENCY_HISTOGRAMS: Mapping[str, Sequence[float]] = {
    "e2e_request_latency_seconds": LATENCY_BUCKETS,
    "request_queue_time_seconds": LATENCY_BUCKETS,
    "request_inference_time_seconds": LATENCY_BUCKETS,
    "request_prefill_time_seconds": LATENCY_BUCKETS,
    "request_decode_time_seconds": LATENCY_BUCKETS,
    "time_to_first_token_seconds": TTFT_BUCKETS,
    "inter_token_latency_seconds": ITL_BUCKETS,
    "request_time_per_output_token_seconds": ITL_BUCKETS,
    "iteration_tokens_total": ITERATION_BUCKETS,
    "request_params_n": SMALL_COUNT_BUCKETS,
    "request_num_preemptions": SMALL_COUNT_BUCKETS,
}
# Their buckets reach up to the context length, which is known once the engine is ready.
LENGTH_HISTOGRAMS = (
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_max_tokens",
    "request_prefill_kv_computed_tokens",
)
REJECTION_REASONS = ("queue_full", "invalid_request", "context_length_exceeded", "model_not_found", "unavailable")
MAX_DRAIN_SECONDS = 60
HTTP_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


def one_two_five(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 … up to `limit`."""
    values: list[int] = []
    power = 1
    while power <= limit:
        values += [factor * power for factor in (1, 2, 5) if factor * power <= limit]
        power *= 10
    return tuple(values) or (1,)


class _Cells:
    """One label combination of a histogram."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Count `count` observations of the same value at once: tokens arrive several per wake-up."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count


class _Histogram(Collector):
    """A histogram for one thread: prometheus_client's own takes a lock and a linear search per observation."""

    def __init__(self, name: str, documentation: str, label_names: Sequence[str], bounds: Sequence[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._label_names = tuple(label_names)
        self._bounds = tuple(float(bound) for bound in bounds)
        self._cells: dict[tuple[str, ...], _Cells] = {}

    def labels(self, *values: str) -> _Cells:
        cells = self._cells.get(values)
        if cells is None:
            cells = self._cells[values] = _Cells(self._bounds)
        return cells

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._label_names)
        for values, cells in self._cells.items():
            cumulative = 0
            buckets: list[tuple[str, float]] = []
            for bound, count in zip((*self._bounds, float("inf")), cells.counts, strict=True):
                cumulative += count
                bound_text: str = floatToGoString(bound)  # type: ignore[no-untyped-call]
                buckets.append((bound_text, float(cumulative)))
            family.add_metric(values, buckets, cells.sum)
        yield family


class Metrics:
    """All metrics of one app, in a registry of its own."""

    def __init__(self, client: EngineClient, *, prefix: str, model_name: str) -> None:
        if prefix and not re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", prefix):
            raise ValueError("the metrics prefix may hold letters, digits, '_' and ':' only, no digit first")
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._client = client
        self._prefix = prefix
        self._labels = {"model_name": model_name, "engine": "0"}
        self._max_model_len: int | None = None
        self._num_waiting = 0
        self._recent_ends: deque[float] = deque(maxlen=512)
        """When the last samples ended, oldest first. They end in batches: enough for several of them."""
        self._pressed_since: float | None = None
        """When the engine's idleness, or the emptiness of its queue, ended; None while it is idle."""
        ProcessCollector(registry=self.registry)
        self._make_gauges()
        self._make_counters()
        self.histograms = {name: self._histogram(name, bounds) for name, bounds in LATENCY_HISTOGRAMS.items()}
        self._http_requests = Counter(
            "http_requests", "HTTP requests.", ("handler", "method", "status"), registry=self.registry
        )
        self._http_seconds = _Histogram(
            "http_request_duration_seconds", "HTTP request duration.", ("handler", "method"), HTTP_BUCKETS
        )
        self.registry.register(self._http_seconds)

    def _make_gauges(self) -> None:
        self._running = self._gauge("num_requests_running", "Sequences in the running batch.")
        self._waiting = self._gauge("num_requests_waiting", "Sequences waiting to be scheduled.")
        self._waiting_by_reason = self._gauges(
            "num_requests_waiting_by_reason", "Waiting sequences by reason.", "reason", ("capacity", "deferred")
        )
        self._cache_usage = self._gauge("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.")
        self._blocks = self._gauges("kv_blocks", "KV blocks by state.", "state", ("free", "cached", "active", "shared"))
        self._message_age = self._gauge("engine_last_message_age_seconds", "Time since the engine last spoke.")

    def _make_counters(self) -> None:
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._preemptions = self._counter("num_preemptions", "Sequences preempted.")
        self._recomputed = self._counter("recomputed_tokens", "Tokens computed again after a preemption.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._steps = self._counter("engine_steps", "Steps of the engine.")
        self._restarts = self._counter("engine_restarts", "Times the engine process was started again.")
        self._num_restarts_seen = 0
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that began.")
        self.prompt_tokens_cached = self._counter("prompt_tokens_cached", "Those taken from the prefix cache.")
        self.prompt_tokens_by_source = self._counters(
            "prompt_tokens_by_source", "Prompt tokens by origin.", "source", ("local_compute", "local_cache_hit")
        )
        self.request_success = self._counters(
            "request_success", "Samples by how they ended.", "finished_reason", ("stop", "length", "abort", "error")
        )
        self._rejections = self._counters(
            "admission_rejections", "Requests refused before any work.", "reason", REJECTION_REASONS
        )
        self._step_seconds = self._counters(
            "step_seconds", "Time of the engine's steps by phase.", "phase", ("schedule", "forward", "sample", "update")
        )

    def _gauge(self, name: str, documentation: str) -> Gauge:
        family = Gauge(self._prefix + name, documentation, tuple(self._labels), registry=self.registry)
        return family.labels(*self._labels.values())

    def _gauges(self, name: str, documentation: str, label: str, values: Sequence[str]) -> dict[str, Gauge]:
        family = Gauge(self._prefix + name, documentation, (*self._labels, label), registry=self.registry)
        return {value: family.labels(*self._labels.values(), value) for value in values}

    def _counter(self, name: str, documentation: str) -> Counter:
        family = Counter(self._prefix + name, documentation, tuple(self._labels), registry=self.registry)
        return family.labels(*self._labels.values())

    def _counters(self, name: str, documentation: str, label: str, values: Sequence[str]) -> dict[str, Counter]:
        family = Counter(self._prefix + name, documentation, (*self._labels, label), registry=self.registry)
        return {value: family.labels(*self._labels.values(), value) for value in values}

    def _histogram(self, name: str, bounds: Sequence[float]) -> _Cells:
        documentation = name.replace("_", " ").capitalize() + "."
        family = _Histogram(self._prefix + name, documentation, tuple(self._labels), bounds)
        self.registry.register(family)
        return family.labels(*self._labels.values())

    def on_step(self, stats: StepStats) -> None:
        """A listener for `EngineClient.stats_listeners`: gauges as they are, counters by their increase."""
        if stats.num_running + stats.num_waiting == 0:
            self._pressed_since = None
        elif self._pressed_since is None or (stats.num_waiting and not self._num_waiting):
            self._pressed_since = time.monotonic()
        self._num_waiting = stats.num_waiting
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._waiting_by_reason["capacity"].set(stats.num_waiting)
        num_active = stats.num_blocks - stats.num_free_blocks
        self._cache_usage.set(num_active / stats.num_blocks if stats.num_blocks else 0.0)
        self._blocks["free"].set(stats.num_free_blocks - stats.num_cached_blocks)
        self._blocks["cached"].set(stats.num_cached_blocks)
        self._blocks["active"].set(num_active - stats.num_shared_blocks)
        self._blocks["shared"].set(stats.num_shared_blocks)
        if stats.num_scheduled_tokens == 0 and not stats.prefix_cache_queries:
            return  # a sign of life, not a step
        self._steps.inc()
        self.histograms["iteration_tokens_total"].observe(stats.num_scheduled_tokens)
        self._generation_tokens.inc(stats.num_generation_tokens)
        self._prefix_queries.inc(stats.prefix_cache_queries)
        self._prefix_hits.inc(stats.prefix_cache_hits)
        self._preemptions.inc(stats.num_preemptions)
        self._recomputed.inc(stats.num_recomputed_tokens)
        self._step_seconds["schedule"].inc(stats.schedule_seconds)
        self._step_seconds["forward"].inc(stats.forward_seconds)
        self._step_seconds["sample"].inc(stats.sample_seconds)
        self._step_seconds["update"].inc(stats.update_seconds)

    def drain_seconds(self) -> int:
        """About how long what waits now, and one more, will take to be served, as fast as samples have ended lately.

        "Lately" begins when the load did, so that idle time is no part of the rate.
        """
        ends, since = self._recent_ends, self._pressed_since
        if since is None:
            return 1
        if len(ends) == ends.maxlen:
            since = max(since, ends[0])
        elapsed = time.monotonic() - since
        num_ends = sum(end > since for end in ends)
        # Where nothing has ended yet, the best guess is that it takes as long again.
        seconds = (self._num_waiting + 1) * elapsed / num_ends if num_ends else elapsed
        return max(1, min(MAX_DRAIN_SECONDS, math.ceil(seconds)))

    def on_end(self, now: float) -> None:
        """One sample has ended well."""
        self._recent_ends.append(now)

    def on_rejection(self, reason: str) -> None:
        """Once for each generation request that was turned down, by the route that it came through."""
        self._rejections[reason if reason in self._rejections else "invalid_request"].inc()

    def on_http(self, handler: str, method: str, status: int, seconds: float) -> None:
        method = method if method in HTTP_METHODS else "other"
        self._http_requests.labels(handler, method, f"{status // 100}xx").inc()
        self._http_seconds.labels(handler, method).observe(seconds)

    def begin_request(self, params: SamplingParams, num_prompt_tokens: int) -> RequestMetrics:
        """Call when a request was handed to the engine, so that the engine's limits are known."""
        if self._client.ready is not None:
            self._learn(self._client.ready)
        return RequestMetrics(self, params, num_prompt_tokens, time.monotonic())

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        client = self._client
        if client.ready is not None:
            self._learn(client.ready)
        self._message_age.set(time.monotonic() - client.last_message_at)
        self._restarts.inc(max(0, client.num_restarts - self._num_restarts_seen))
        self._num_restarts_seen = max(client.num_restarts, self._num_restarts_seen)
        if client.state is not EngineState.READY:
            self.on_step(StepStats())  # nothing runs in an engine that is not there
        return generate_latest(self.registry)

    def _learn(self, ready: EngineReady) -> None:
        """Create what depends on what the engine derived at start. A restarted engine derives the same."""
        if self._max_model_len is not None:
            return
        self._max_model_len = ready.max_model_len
        bounds = one_two_five(ready.max_model_len)
        self.histograms |= {name: self._histogram(name, bounds) for name in LENGTH_HISTOGRAMS}
        config = {
            "block_size": str(ready.block_size),
            "num_gpu_blocks": str(ready.num_blocks),
            "num_blocks": str(ready.num_blocks),
            "kv_cache_bytes": str(ready.kv_cache_bytes),
            "enable_prefix_caching": str(ready.prefix_caching),
            "cache_dtype": ready.dtype,
        }
        info = Gauge(
            self._prefix + "cache_config_info", "The KV cache's configuration.", (*self._labels, *config),
            registry=self.registry,
        )  # fmt: skip
        info.labels(*self._labels.values(), *config.values()).set(1)


class RequestMetrics:
    """One request's way through the histograms; the `GenerationObserver` of its stream."""

    __slots__ = ("_last_at", "_max_tokens", "_metrics", "_num_finished", "_num_prompt_tokens", "_num_tokens",
                 "_params", "_started_at")  # fmt: skip

    def __init__(self, metrics: Metrics, params: SamplingParams, num_prompt_tokens: int, started_at: float) -> None:
        self._metrics = metrics
        self._params = params
        self._num_prompt_tokens = num_prompt_tokens
        self._started_at = started_at
        self._last_at: dict[int, float] = {}
        self._num_tokens: dict[int, int] = {}
        self._num_finished = 0

    def on_deltas(self, deltas: list[TextDelta], num_cached_tokens: int, now: float) -> None:
        histograms = self._metrics.histograms
        if not self._last_at:
            self._on_first_output(num_cached_tokens)
        for delta in deltas:
            num_new = len(delta.token_ids)
            last_at = self._last_at.get(delta.index)
            if last_at is None:
                histograms["time_to_first_token_seconds"].observe(now - self._started_at)
            elif num_new:
                histograms["inter_token_latency_seconds"].observe((now - last_at) / num_new, num_new)
            if num_new or last_at is None:
                self._last_at[delta.index] = now
                self._num_tokens[delta.index] = self._num_tokens.get(delta.index, 0) + num_new
            if delta.finish_reason is not None:
                self._on_finish(delta, now)

    def _on_first_output(self, num_cached_tokens: int) -> None:
        metrics, histograms = self._metrics, self._metrics.histograms
        num_computed = max(0, self._num_prompt_tokens - num_cached_tokens)
        metrics.prompt_tokens.inc(self._num_prompt_tokens)
        metrics.prompt_tokens_cached.inc(num_cached_tokens)
        metrics.prompt_tokens_by_source["local_compute"].inc(num_computed)
        metrics.prompt_tokens_by_source["local_cache_hit"].inc(num_cached_tokens)
        histograms["request_prefill_kv_computed_tokens"].observe(num_computed)

    def _on_finish(self, delta: TextDelta, now: float) -> None:
        """One sample has ended well."""
        histograms = self._metrics.histograms
        num_tokens = self._num_tokens[delta.index]
        self._num_finished += 1
        self._metrics.on_end(now)
        self._metrics.request_success[delta.finish_reason or "stop"].inc()
        histograms["e2e_request_latency_seconds"].observe(now - self._started_at)
        histograms["request_prompt_tokens"].observe(self._num_prompt_tokens)
        histograms["request_generation_tokens"].observe(num_tokens)
        if delta.timings is not None:
            self._on_timings(delta.timings, num_tokens)
        if self._num_finished == self._params.n:
            histograms["request_max_num_generation_tokens"].observe(max(self._num_tokens.values()))
            histograms["request_params_n"].observe(self._params.n)
            if self._params.max_tokens is not None:
                histograms["request_params_max_tokens"].observe(self._params.max_tokens)

    def _on_timings(self, timings: RequestTimings, num_tokens: int) -> None:
        histograms = self._metrics.histograms
        decode_seconds = timings.last_token - timings.first_token
        histograms["request_queue_time_seconds"].observe(timings.scheduled - timings.arrival)
        histograms["request_prefill_time_seconds"].observe(timings.first_token - timings.scheduled)
        histograms["request_decode_time_seconds"].observe(decode_seconds)
        histograms["request_inference_time_seconds"].observe(timings.last_token - timings.scheduled)
        histograms["request_num_preemptions"].observe(timings.num_preemptions)
        if num_tokens > 1:
            histograms["request_time_per_output_token_seconds"].observe(decode_seconds / (num_tokens - 1))

    def on_closed(self, error: RequestError | None, now: float) -> None:
        num_open = self._params.n - self._num_finished
        if num_open:
            self._metrics.request_success["abort" if error is None else "error"].inc(num_open)
