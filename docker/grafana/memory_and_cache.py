"""The dashboard *memory and cache*: where the memory is, and how well the K/V pool is used."""

from __future__ import annotations

from panels import (
    GREEN,
    RED,
    SERVER,
    YELLOW,
    Json,
    Query,
    dashboard,
    metric,
    quantiles,
    row,
    stat,
    steps,
    timeseries,
    total_rate,
)

UID = "octavo-memory-and-cache"


def build() -> Json:
    return dashboard(
        UID,
        "Octavo: memory and cache",
        "Where the memory is, how full the K/V pool is, and what the prefix cache saves.",
        [_overview(), _pool(), _prefix_cache(), _preemption(), _memory()],
        [],
    )


def _hit_ratio() -> str:
    return f"{total_rate('prefix_cache_hits_total')} / {total_rate('prefix_cache_queries_total')}"


def _overview() -> list[Json]:
    return row(
        "At a glance",
        stat(
            "Engine",
            "Whether the engine process serves. Down: see /ready and the server's log, which say why.",
            Query(f"min({metric('engine_up')})", "engine"),
            unit="none",
            thresholds=steps((None, RED), (1, GREEN)),
            names={"0": "down", "1": "up"},
        ),
        stat(
            "K/V pool in use",
            "The fullest engine's share of referenced blocks. Cached blocks count as free: they are given up when "
            "needed. Near 100 % for long: raise --kv-cache-memory or lower --max-num-seqs.",
            Query(f"max({metric('kv_cache_usage_perc')})", "in use"),
            unit="percentunit",
            thresholds=steps((None, GREEN), (0.8, YELLOW), (0.95, RED)),
        ),
        stat(
            "Prefix hit ratio",
            "Prompt tokens found in the cache, of those looked up; recomputation after a preemption does not count. "
            "What is good depends on the traffic: chats and shared system prompts reach 50 % and more.",
            Query(_hit_ratio(), "hits"),
            unit="percentunit",
            thresholds=steps((None, "text")),
        ),
        stat(
            "Preemptions",
            "Sequences that lost their blocks, per second. More than a few a minute wastes work: see the row below.",
            Query(total_rate("num_preemptions_total"), "preemptions"),
            unit="ops",
            thresholds=steps((None, GREEN), (0.1, YELLOW), (1, RED)),
        ),
        stat(
            "K/V pool",
            "Size of the pool, allocated once at start. By default half of the memory that is free on a CPU, and most "
            "of it on a GPU; set it with --kv-cache-memory.",
            Query(f"sum({metric('kv_cache_bytes')})", "pool"),
            unit="bytes",
            thresholds=steps((None, "text")),
        ),
        stat(
            "Engine restarts",
            "Since the server was started. Each one ended all open requests with an error; the log says why.",
            Query(f"sum({metric('engine_restarts_total')})", "restarts"),
            unit="none",
            thresholds=steps((None, GREEN), (1, RED)),
        ),
    )


def _pool() -> list[Json]:
    return row(
        "K/V pool",
        timeseries(
            "K/V pool in use",
            "Share of blocks that some sequence references. When it stays above 95 %, requests wait for blocks.",
            [Query(metric("kv_cache_usage_perc"), "{{instance}} {{engine}}")],
            unit="percentunit",
            highest=1,
            thresholds=steps((None, GREEN), (0.95, RED)),
        ),
        timeseries(
            "Blocks by state",
            "free: empty; cached: free, but holding a prefix that may be found again; active: one sequence's; "
            "shared: several sequences'. No free and few cached blocks under load is normal; preemptions are the sign "
            "that it is too few.",
            [Query(f"sum by (state) ({metric('kv_blocks')})", "{{state}}")],
            unit="none",
            stacked=True,
        ),
        timeseries(
            "Evictions",
            "Cached blocks whose prefix was given up for something new, per second. Many, together with misses by "
            "reason 'evicted' below: a larger pool would find more prefixes.",
            [Query(total_rate("kv_blocks_evicted_total"), "blocks evicted")],
            unit="ops",
        ),
    )


def _prefix_cache() -> list[Json]:
    return row(
        "Prefix cache",
        timeseries(
            "Hit ratio",
            "Prompt tokens found in the cache, of those looked up.",
            [Query(_hit_ratio(), "hit ratio")],
            unit="percentunit",
            highest=1,
        ),
        timeseries(
            "Lookups and hits",
            "Prompt tokens per second that were looked up, and that were found. Zero lookups under load: the cache is "
            "off (--no-enable-prefix-caching).",
            [
                Query(total_rate("prefix_cache_queries_total"), "looked up"),
                Query(total_rate("prefix_cache_hits_total"), "found"),
            ],
            unit="none",
        ),
        timeseries(
            "Misses by reason",
            "Prompt tokens per second that were not found. new: never seen; evicted: seen, and given up since (more "
            "memory helps); tail: the last, partial block, and the token that must be computed anyway.",
            [Query(total_rate("prefix_cache_misses_total", by="reason"), "{{reason}}")],
            unit="none",
            stacked=True,
        ),
        timeseries(
            "Prompt tokens by source",
            "Prompt tokens per second of requests that began: computed here, or taken from the cache.",
            [Query(total_rate("prompt_tokens_by_source_total", by="source"), "{{source}}")],
            unit="none",
            stacked=True,
            width=12,
        ),
        timeseries(
            "Prompt tokens computed per request",
            "What is left of a prompt after the cache. Far below the prompt lengths: the cache works.",
            quantiles("request_prefill_kv_computed_tokens"),
            unit="none",
            width=12,
        ),
    )


def _preemption() -> list[Json]:
    return row(
        "Preemption",
        timeseries(
            "Preemptions",
            "Sequences per second that gave up their blocks so that others could go on. Sustained: raise "
            "--kv-cache-memory or lower --max-num-seqs.",
            [Query(total_rate("num_preemptions_total"), "preemptions")],
            unit="ops",
        ),
        timeseries(
            "Tokens computed again",
            "Per second, because of preemptions; compare with all tokens of a step. What the prefix cache still "
            "holds is not computed again.",
            [
                Query(total_rate("recomputed_tokens_total"), "computed again"),
                Query(total_rate("iteration_tokens_total_sum"), "all computed"),
            ],
            unit="none",
        ),
        timeseries(
            "Waiting by reason",
            "capacity: no seat or too few blocks; deferred: there is room, and they wait only for a step with tokens "
            "left, or for the prompt of their request. Waiting for capacity while the pool is not full: "
            "--max-num-seqs is the limit.",
            [Query(f"sum by (reason) ({metric('num_requests_waiting_by_reason')})", "{{reason}}")],
            unit="none",
            stacked=True,
        ),
    )


def _memory() -> list[Json]:
    return row(
        "Memory and processes",
        timeseries(
            "Pool and weights",
            "Bytes of the K/V pool and of the weights. On a GPU both lie in its memory and are no part of the "
            "processes' below.",
            [
                Query(metric("kv_cache_bytes"), "K/V pool {{instance}}"),
                Query(metric("model_weights_bytes"), "weights {{instance}}"),
            ],
            unit="bytes",
        ),
        timeseries(
            "Resident memory",
            "Of the engine process and of the HTTP process. The pool's pages become resident as they are first "
            "used, so the engine grows to its size and then stays; growth beyond that is a leak worth reporting.",
            [
                Query(metric("engine_resident_memory_bytes"), "engine {{instance}}"),
                Query(f"process_resident_memory_bytes{{{SERVER}}}", "HTTP {{instance}}"),
            ],
            unit="bytes",
        ),
        timeseries(
            "Engine restarts",
            "Since the server was started. The log has the reason; SIGKILL without another is the kernel's, for want "
            "of memory.",
            [Query(metric("engine_restarts_total"), "{{instance}}")],
            unit="none",
        ),
    )
