"""What one request adds to the metrics, from its first output to its end."""

from __future__ import annotations

import time

from ..scheduler.sampling_params import SamplingParams
from .engine.messages import RequestError, RequestTimings
from .metrics import Metrics
from .outputs import TextDelta


class RequestMetrics:
    """One request's way through the counters and histograms; the `GenerationObserver` of its stream."""

    __slots__ = ("_histograms", "_last_at", "_metrics", "_num_finished", "_num_prompt_tokens", "_num_tokens",
                 "_params", "_started_at")  # fmt: skip

    def __init__(self, metrics: Metrics, params: SamplingParams, num_prompt_tokens: int) -> None:
        """Make it when the request was handed to the engine, so that the engine's limits are known."""
        metrics.learn_engine()
        self._metrics = metrics
        self._histograms = metrics.histograms
        self._params = params
        self._num_prompt_tokens = num_prompt_tokens
        self._started_at = time.monotonic()
        self._last_at: dict[int, float] = {}
        self._num_tokens: dict[int, int] = {}
        self._num_finished = 0

    def on_deltas(self, deltas: list[TextDelta], num_cached_tokens: int, now: float) -> None:
        histograms = self._histograms
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
        metrics = self._metrics
        num_computed = max(0, self._num_prompt_tokens - num_cached_tokens)
        metrics.prompt_tokens.inc(self._num_prompt_tokens)
        metrics.prompt_tokens_cached.inc(num_cached_tokens)
        metrics.prompt_tokens_by_source["local_compute"].inc(num_computed)
        metrics.prompt_tokens_by_source["local_cache_hit"].inc(num_cached_tokens)
        self._histograms["request_prefill_kv_computed_tokens"].observe(num_computed)

    def _on_finish(self, delta: TextDelta, now: float) -> None:
        """One sample has ended well."""
        histograms = self._histograms
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
        histograms = self._histograms
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
