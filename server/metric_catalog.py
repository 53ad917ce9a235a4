"""Every metric by name, as data: what it counts, its labels, its buckets. docs/metrics.md says what they mean together.

Names, labels and buckets are those of vLLM's dashboards where it has such a metric. All of these have the prefix and
the labels `model_name` and `engine`; the metrics of HTTP, as there, have neither, and are in metrics.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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

REJECTION_REASONS = ("queue_full", "invalid_request", "context_length_exceeded", "model_not_found", "unavailable")


@dataclass(frozen=True, slots=True)
class Family:
    """One gauge or counter, or several told apart by one more label."""

    help: str
    label: str | None = None
    values: tuple[str, ...] = ()
    """Of the label: all of them exist from the start, at 0."""


@dataclass(frozen=True, slots=True)
class HistogramFamily:
    """A histogram; without bounds they are 1, 2, 5, 10 … up to the context length, known once the engine is ready."""

    help: str
    bounds: tuple[float, ...] | None


GAUGES: Mapping[str, Family] = {
    "engine_up": Family("1 while the engine serves, else 0."),
    "num_requests_running": Family("Sequences in the running batch."),
    "num_requests_waiting": Family("Sequences waiting to be scheduled."),
    "num_requests_waiting_by_reason": Family(
        "Waiting sequences by what they wait for: seats or blocks, or only a step.", "reason", ("capacity", "deferred")
    ),
    "kv_cache_usage_perc": Family("Share of the KV blocks in use, 0 to 1, in the fullest pool."),
    "kv_blocks": Family("KV blocks by state.", "state", ("free", "cached", "active", "shared")),
    "kv_cache_bytes": Family("Size of the KV pool."),
    "model_weights_bytes": Family("Size of the weights as the engine holds them."),
    "engine_resident_memory_bytes": Family("Resident memory of the engine's process."),
    "engine_last_message_age_seconds": Family("Time since the engine last spoke."),
}

# Counters that the engine's statistics carry: (name, value of the label) → field of StepStats.
STEP_FIELDS: Mapping[tuple[str, str | None], str] = {
    ("prefix_cache_queries", None): "prefix_cache_queries",
    ("prefix_cache_hits", None): "prefix_cache_hits",
    ("prefix_cache_misses", "new"): "prefix_misses_new",
    ("prefix_cache_misses", "evicted"): "prefix_misses_evicted",
    ("prefix_cache_misses", "tail"): "prefix_misses_tail",
    ("kv_blocks_evicted", None): "num_evicted_blocks",
    ("num_preemptions", None): "num_preemptions",
    ("recomputed_tokens", None): "num_recomputed_tokens",
    ("generation_tokens", None): "num_generation_tokens",
    ("step_seconds", "schedule"): "schedule_seconds",
    ("step_seconds", "forward"): "forward_seconds",
    ("step_seconds", "sample"): "sample_seconds",
    ("step_seconds", "update"): "update_seconds",
    ("step_seconds", "emit"): "emit_seconds",
}

# Without the `_total` that they get on the wire.
COUNTERS: Mapping[str, Family] = {
    "prefix_cache_queries": Family("Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": Family("Prompt tokens found in the prefix cache."),
    "prefix_cache_misses": Family(
        "Prompt tokens not found in the prefix cache, by cause.", "reason", ("new", "evicted", "tail")
    ),
    "kv_blocks_evicted": Family("Cached KV blocks reused for other contents."),
    "num_preemptions": Family("Sequences preempted."),
    "recomputed_tokens": Family("Tokens computed again after a preemption."),
    "generation_tokens": Family("Tokens generated."),
    "engine_steps": Family("Steps of the engine."),
    "engine_restarts": Family("Times the engine process was started again."),
    "step_seconds": Family(
        "Time of the engine's steps by phase.", "phase", ("schedule", "forward", "sample", "update", "emit")
    ),
    "prompt_tokens": Family("Prompt tokens of requests that began."),
    "prompt_tokens_cached": Family("Those taken from the prefix cache."),
    "prompt_tokens_by_source": Family("Prompt tokens by origin.", "source", ("local_compute", "local_cache_hit")),
    "request_success": Family(
        "Samples by how they ended.", "finished_reason", ("stop", "length", "abort", "error")
    ),
    "admission_rejections": Family("Requests refused before any work.", "reason", REJECTION_REASONS),
}  # fmt: skip

HISTOGRAMS: Mapping[str, HistogramFamily] = {
    "e2e_request_latency_seconds": HistogramFamily("From submission to a sample's last token.", LATENCY_BUCKETS),
    "request_queue_time_seconds": HistogramFamily("From submission to the first admission.", LATENCY_BUCKETS),
    "request_inference_time_seconds": HistogramFamily("From admission to the last token.", LATENCY_BUCKETS),
    "request_prefill_time_seconds": HistogramFamily("From admission to the first token.", LATENCY_BUCKETS),
    "request_decode_time_seconds": HistogramFamily("From the first token to the last.", LATENCY_BUCKETS),
    "time_to_first_token_seconds": HistogramFamily("From submission to a sample's first token.", TTFT_BUCKETS),
    "inter_token_latency_seconds": HistogramFamily("From one token of a sample to the next.", ITL_BUCKETS),
    "request_time_per_output_token_seconds": HistogramFamily(
        "Decode time of a sample over its tokens after the first.", ITL_BUCKETS
    ),
    "iteration_tokens_total": HistogramFamily("Tokens computed in one step.", ITERATION_BUCKETS),
    "request_params_n": HistogramFamily("Samples asked for in a request.", SMALL_COUNT_BUCKETS),
    "request_num_preemptions": HistogramFamily("Preemptions that a sample suffered.", SMALL_COUNT_BUCKETS),
    "request_prompt_tokens": HistogramFamily("Prompt tokens of a sample.", None),
    "request_generation_tokens": HistogramFamily("Generated tokens of a sample.", None),
    "request_max_num_generation_tokens": HistogramFamily("Generated tokens of a request's longest sample.", None),
    "request_params_max_tokens": HistogramFamily("max_tokens of a request that set it.", None),
    "request_prefill_kv_computed_tokens": HistogramFamily("Prompt tokens of a request not found in the cache.", None),
}
