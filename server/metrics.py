"""Prometheus metrics: the only module that touches prometheus_client. metric_catalog.py names them all.

Everything is updated and read on the event loop, and what is updated with every step or token takes no locks: step
statistics are added up as plain numbers until somebody scrapes, histograms are our own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from operator import add, attrgetter
from typing import TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from .drain import DrainRate
from .engine.client import EngineClient, EngineState
from .engine.messages import EngineReady, StepStats
from .histogram import Histogram, one_two_five
from .metric_catalog import COUNTERS, GAUGES, HISTOGRAMS, HTTP_BUCKETS, STEP_FIELDS, Family

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
HTTP_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))

_Kind = TypeVar("_Kind", Gauge, Counter)
_step_values = attrgetter(*STEP_FIELDS.values())


class _HistogramCollector(Collector):
    """Shows histograms that differ in the values of their labels under one name."""

    def __init__(self, name: str, documentation: str, label_names: Sequence[str], bounds: Sequence[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._label_names = tuple(label_names)
        self._bounds = bounds
        self._histograms: dict[tuple[str, ...], Histogram] = {}

    def labels(self, *values: str) -> Histogram:
        histogram = self._histograms.get(values)
        if histogram is None:
            histogram = self._histograms[values] = Histogram(self._bounds)
        return histogram

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._label_names)
        for values, histogram in self._histograms.items():
            buckets: list[tuple[str, float]] = []
            for bound, count in histogram.cumulative():
                bound_text: str = floatToGoString(bound)  # type: ignore[no-untyped-call]
                buckets.append((bound_text, float(count)))
            family.add_metric(values, buckets, histogram.sum)
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
        self._drain = DrainRate()
        self._stats = StepStats()
        """The engine's latest word: what the gauges show."""
        self._step_totals: Sequence[float] = [0] * len(STEP_FIELDS)
        """Increase of each counter of STEP_FIELDS since the last scrape."""
        self._num_steps = 0
        self._num_restarts_seen = 0
        ProcessCollector(registry=self.registry)
        self._gauges = {name: self._children(Gauge, name, family) for name, family in GAUGES.items()}
        self._counters = {name: self._children(Counter, name, family) for name, family in COUNTERS.items()}
        self.prompt_tokens = self._counters["prompt_tokens"][None]
        self.prompt_tokens_cached = self._counters["prompt_tokens_cached"][None]
        self.prompt_tokens_by_source = self._counters["prompt_tokens_by_source"]
        self.request_success = self._counters["request_success"]
        self._rejections = self._counters["admission_rejections"]
        self.histograms: dict[str, Histogram] = {}
        """By name. Those that reach up to the context length join once the engine is ready."""
        for name, family in HISTOGRAMS.items():
            if family.bounds is not None:
                self.histograms[name] = self._histogram(name, family.help, family.bounds)
        self._iteration_tokens = self.histograms["iteration_tokens_total"]
        self._engine_is_known = False
        self._http_requests = Counter(
            "http_requests", "HTTP requests.", ("handler", "method", "status"), registry=self.registry
        )
        self._http_seconds = _HistogramCollector(
            "http_request_duration_seconds", "HTTP request duration.", ("handler", "method"), HTTP_BUCKETS
        )
        self.registry.register(self._http_seconds)

    def _children(self, kind: type[_Kind], name: str, family: Family) -> dict[str | None, _Kind]:
        """Register a family and make its children: by the value of its own label, or the only one under None."""
        label_names = [*self._labels] if family.label is None else [*self._labels, family.label]
        parent = kind(self._prefix + name, family.help, label_names, registry=self.registry)
        common = self._labels.values()
        if family.label is None:
            return {None: parent.labels(*common)}
        return {value: parent.labels(*common, value) for value in family.values}

    def _histogram(self, name: str, documentation: str, bounds: Sequence[float]) -> Histogram:
        collector = _HistogramCollector(self._prefix + name, documentation, tuple(self._labels), bounds)
        self.registry.register(collector)
        return collector.labels(*self._labels.values())

    # ------------------------------------------------------------------ what happens

    def on_step(self, stats: StepStats) -> None:
        """A listener for `EngineClient.stats_listeners`. Called with every step: it only adds up."""
        self._stats = stats
        self._drain.on_load(stats.num_running, stats.num_waiting)
        self._step_totals = list(map(add, self._step_totals, _step_values(stats)))
        if stats.num_scheduled_tokens:  # else it is a sign of life, not a step
            self._num_steps += 1
            self._iteration_tokens.observe(stats.num_scheduled_tokens)

    def drain_seconds(self) -> int:
        """About how long what waits now, and one more, will take to be served."""
        return self._drain.seconds()

    def on_end(self, now: float) -> None:
        """One sample has ended well."""
        self._drain.on_end(now)

    def on_rejection(self, reason: str) -> None:
        """Once for each generation request that was turned down, by the route that it came through."""
        self._rejections[reason if reason in self._rejections else "invalid_request"].inc()

    def on_http(self, handler: str, method: str, status: int, seconds: float) -> None:
        method = method if method in HTTP_METHODS else "other"
        self._http_requests.labels(handler, method, f"{status // 100}xx").inc()
        self._http_seconds.labels(handler, method).observe(seconds)

    # ------------------------------------------------------------------ what is shown

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        self.learn_engine()
        self._count_steps()
        self._show_load(self._stats)
        self._show_engine()
        return generate_latest(self.registry)

    def _count_steps(self) -> None:
        for (name, value), increase in zip(STEP_FIELDS, self._step_totals, strict=True):
            self._counters[name][value].inc(increase)
        self._counters["engine_steps"][None].inc(self._num_steps)
        self._step_totals, self._num_steps = [0] * len(STEP_FIELDS), 0
        num_restarts = max(self._client.num_restarts, self._num_restarts_seen)
        self._counters["engine_restarts"][None].inc(num_restarts - self._num_restarts_seen)
        self._num_restarts_seen = num_restarts

    def _show_load(self, stats: StepStats) -> None:
        num_active = stats.num_blocks - stats.num_free_blocks
        waiting = self._gauges["num_requests_waiting_by_reason"]
        waiting["capacity"].set(stats.num_waiting - stats.num_waiting_deferred)
        waiting["deferred"].set(stats.num_waiting_deferred)
        blocks = self._gauges["kv_blocks"]
        blocks["free"].set(stats.num_free_blocks - stats.num_cached_blocks)
        blocks["cached"].set(stats.num_cached_blocks)
        blocks["active"].set(num_active - stats.num_shared_blocks)
        blocks["shared"].set(stats.num_shared_blocks)
        self._set("num_requests_running", stats.num_running)
        self._set("num_requests_waiting", stats.num_waiting)
        self._set("kv_cache_usage_perc", stats.block_usage)

    def _show_engine(self) -> None:
        client = self._client
        ready = client.ready if client.state is EngineState.READY else None
        self._set("engine_up", ready is not None)
        self._set("kv_cache_bytes", ready.kv_cache_bytes if ready is not None else 0)
        self._set("model_weights_bytes", ready.weight_bytes if ready is not None else 0)
        self._set("engine_resident_memory_bytes", _resident_bytes(client.engine_pid))
        self._set("engine_last_message_age_seconds", time.monotonic() - client.last_message_at)

    def _set(self, name: str, value: float) -> None:
        self._gauges[name][None].set(value)

    def learn_engine(self) -> None:
        """Create what depends on what the engine derived at start. A restarted engine derives the same."""
        ready = self._client.ready
        if self._engine_is_known or ready is None:
            return
        self._engine_is_known = True
        bounds = one_two_five(ready.max_model_len)
        for name, family in HISTOGRAMS.items():
            if family.bounds is None:
                self.histograms[name] = self._histogram(name, family.help, bounds)
        config = _cache_config(ready)
        info = Gauge(
            self._prefix + "cache_config_info", "1; the KV cache's configuration is in the labels.",
            (*self._labels, *config), registry=self.registry,
        )  # fmt: skip
        info.labels(*self._labels.values(), *config.values()).set(1)


def _cache_config(ready: EngineReady) -> dict[str, str]:
    return {
        "block_size": str(ready.block_size),
        "num_gpu_blocks": str(ready.num_blocks),
        "num_blocks": str(ready.num_blocks),
        "kv_cache_bytes": str(ready.kv_cache_bytes),
        "enable_prefix_caching": str(ready.prefix_caching),
        "cache_dtype": ready.dtype,
    }


def _resident_bytes(pid: int | None) -> int:
    """Resident memory of a process; 0 if there is none, or it has just gone."""
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss) if pid is not None else 0
    except psutil.Error:
        return 0
