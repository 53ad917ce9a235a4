"""The dashboard *throughput and latency*: what users get, and where the time goes."""

from __future__ import annotations

from panels import (
    GREEN,
    RED,
    SERVER,
    YELLOW,
    Json,
    Query,
    choice,
    dashboard,
    heatmap,
    metric,
    quantile,
    quantiles,
    rate,
    row,
    stat,
    steps,
    timeseries,
    total_rate,
)

UID = "octavo-throughput-and-latency"


def build() -> Json:
    # An SLO is read from one bucket, so its limit must be a bucket's bound, spelled as Octavo spells it.
    slos = [
        choice("ttft_slo", "First token within (s)", ("0.1", "0.25", "0.5", "1.0", "2.5", "5.0", "10.0"), "1.0"),
        choice("itl_slo", "Next token within (s)", ("0.01", "0.025", "0.05", "0.1", "0.2", "0.5"), "0.1"),
    ]
    return dashboard(
        UID,
        "Octavo: throughput and latency",
        "What users get, whether it is fast enough, and where the time goes.",
        [_overview(), _load(), _latency(), _spread(), _phases(), _engine(), _http(), _lengths()],
        slos,
    )


def _attainment(histogram: str, variable: str) -> str:
    """Share of the observations within the limit that a variable holds."""
    within = total_rate(histogram + "_bucket", f'le="${variable}"')
    return f"{within} / {total_rate(histogram + '_count')}"


def _overview() -> list[Json]:
    return row(
        "At a glance",
        stat(
            "Samples finished",
            "Per second, however they ended.",
            Query(total_rate("request_success_total"), "samples"),
            unit="reqps",
            thresholds=steps((None, "text")),
        ),
        stat(
            "Tokens generated",
            "Per second, over all requests.",
            Query(total_rate("generation_tokens_total"), "tokens"),
            unit="none",
            thresholds=steps((None, "text")),
        ),
        stat(
            "First tokens in time",
            "Share of first tokens within the limit chosen above. Falling: look at queue time and prefill time.",
            Query(_attainment("time_to_first_token_seconds", "ttft_slo"), "in time"),
            unit="percentunit",
            thresholds=steps((None, RED), (0.9, YELLOW), (0.95, GREEN)),
        ),
        stat(
            "Next tokens in time",
            "Share of the gaps between tokens within the limit chosen above. Falling: the batch or the step's token "
            "budget is too large for the machine (--max-num-seqs, --max-num-batched-tokens).",
            Query(_attainment("inter_token_latency_seconds", "itl_slo"), "in time"),
            unit="percentunit",
            thresholds=steps((None, RED), (0.9, YELLOW), (0.95, GREEN)),
        ),
        stat(
            "5xx",
            "Share of HTTP responses that are the server's fault (starting, restarting, stopping, internal errors).",
            Query(_server_errors(), "5xx"),
            unit="percentunit",
            thresholds=steps((None, GREEN), (0.01, YELLOW), (0.05, RED)),
        ),
        stat(
            "Engine's last message",
            "An engine speaks every 2 s even when idle. Above 30 s it hangs, or one step takes that long.",
            Query(f"max({metric('engine_last_message_age_seconds')})", "age"),
            unit="s",
            thresholds=steps((None, GREEN), (10, YELLOW), (30, RED)),
        ),
    )


def _server_errors() -> str:
    errors = f'sum(rate(http_requests_total{{{SERVER},status="5xx"}}[$__rate_interval]))'
    # Before the first error there is no such series: that is no error, not no data.
    return f"({errors} or vector(0)) / sum(rate(http_requests_total{{{SERVER}}}[$__rate_interval]))"


def _load() -> list[Json]:
    return row(
        "Load",
        timeseries(
            "Samples finished, by reason",
            "stop: ended by the model or a stop string; length: by max_tokens; abort: the client left; error: the "
            "engine failed. Any errors: see the log.",
            [Query(total_rate("request_success_total", by="finished_reason"), "{{finished_reason}}")],
            unit="reqps",
            stacked=True,
        ),
        timeseries(
            "Tokens in and out",
            "Prompt tokens of requests that began (cached ones included), and generated tokens, per second.",
            [Query(total_rate("prompt_tokens_total"), "in"), Query(total_rate("generation_tokens_total"), "out")],
            unit="none",
        ),
        timeseries(
            "Running and waiting",
            "Sequences in the batch and in the queue. A queue that never empties: this server is at its limit.",
            [
                Query(f"sum({metric('num_requests_running')})", "running"),
                Query(f"sum by (reason) ({metric('num_requests_waiting_by_reason')})", "waiting: {{reason}}"),
            ],
            unit="none",
            stacked=True,
        ),
    )


def _latency() -> list[Json]:
    return row(
        "Latency",
        timeseries(
            "Time to first token",
            "From the request's arrival to its first token: queue and prefill.",
            quantiles("time_to_first_token_seconds"),
            unit="s",
            thresholds=steps((None, GREEN), (2.5, RED)),
            width=6,
        ),
        timeseries(
            "Time between tokens",
            "Gap before each further token of a sample (ITL). It grows with the batch, and with prompts computed "
            "beside it.",
            quantiles("inter_token_latency_seconds"),
            unit="s",
            thresholds=steps((None, GREEN), (0.2, RED)),
            width=6,
        ),
        timeseries(
            "Time per output token",
            "Mean of a sample's gaps (TPOT), over samples.",
            quantiles("request_time_per_output_token_seconds"),
            unit="s",
            width=6,
        ),
        timeseries(
            "Whole request",
            "From arrival to the last token. It follows the output length.",
            quantiles("e2e_request_latency_seconds"),
            unit="s",
            width=6,
        ),
    )


def _spread() -> list[Json]:
    return row(
        "Spread",
        heatmap(
            "Time to first token",
            "Two bands are usual: prompts found in the cache, and those computed.",
            "time_to_first_token_seconds",
            unit="s",
        ),
        heatmap(
            "Time between tokens",
            "A faint band far above the others is steps that also computed long prompts.",
            "inter_token_latency_seconds",
            unit="s",
        ),
        timeseries(
            "In time",
            "Share of first tokens, and of gaps between tokens, within the limits chosen above.",
            [
                Query(_attainment("time_to_first_token_seconds", "ttft_slo"), "first token ≤ $ttft_slo s"),
                Query(_attainment("inter_token_latency_seconds", "itl_slo"), "next token ≤ $itl_slo s"),
            ],
            unit="percentunit",
            highest=1,
            thresholds=steps((None, RED), (0.95, GREEN)),
            width=24,
        ),
    )


def _phases() -> list[Json]:
    stages = (("queue", "waiting"), ("prefill", "prefill"), ("decode", "decode"))
    means = [
        Query(
            f"{total_rate(f'request_{stage}_time_seconds_sum')} / {total_rate(f'request_{stage}_time_seconds_count')}",
            legend,
        )
        for stage, legend in stages
    ]
    return row(
        "Where a request's time goes",
        timeseries(
            "Mean time by stage",
            "Waiting for a seat, computing the prompt, generating. Much waiting: add a server, or raise "
            "--max-num-seqs if the pool has room.",
            means,
            unit="s",
            stacked=True,
            width=12,
        ),
        timeseries(
            "p95 by stage",
            "The same for the slowest twentieth. The finest bucket ends at 0.3 s, so small values are rough.",
            [Query(quantile(f"request_{stage}_time_seconds", 0.95), legend) for stage, legend in stages],
            unit="s",
            width=12,
        ),
    )


def _engine() -> list[Json]:
    return row(
        "Engine",
        timeseries(
            "Step time by phase",
            "Seconds per second, so 1 is an engine that is always busy. forward and sample are the model's; much of "
            "schedule, update or emit means overhead, or very small steps.",
            [Query(total_rate("step_seconds_total", by="phase"), "{{phase}}")],
            unit="none",
            stacked=True,
            width=6,
        ),
        timeseries(
            "Steps",
            "Steps of the engine per second.",
            [Query(total_rate("engine_steps_total"), "steps")],
            unit="ops",
            width=6,
        ),
        timeseries(
            "Tokens per step",
            "Computed in one step, prompts and decodes together; --max-num-batched-tokens is the limit.",
            quantiles("iteration_tokens_total"),
            unit="none",
            width=6,
        ),
        timeseries(
            "Engine's last message",
            "Age of the newest message of the engine. Above 30 s it hangs; /ready turns 503 at --engine-stall-timeout.",
            [Query(metric("engine_last_message_age_seconds"), "{{instance}}")],
            unit="s",
            thresholds=steps((None, GREEN), (30, RED)),
            width=6,
        ),
    )


def _http() -> list[Json]:
    requests = f"rate(http_requests_total{{{SERVER}}}[$__rate_interval])"
    durations = f"rate(http_request_duration_seconds_bucket{{{SERVER}}}[$__rate_interval])"
    return row(
        "HTTP",
        timeseries(
            "Responses by status",
            "4xx: the callers' mistakes, and 429 when the queue is full; 5xx: ours. Probes and scrapes do not count.",
            [Query(f"sum by (status) ({requests})", "{{status}}")],
            unit="reqps",
            stacked=True,
            width=6,
        ),
        timeseries(
            "Requests by handler",
            "Which routes are used; 'none' got to no route: unknown paths, no or wrong API keys, bodies too large.",
            [Query(f"sum by (handler, method) ({requests})", "{{method}} {{handler}}")],
            unit="reqps",
            stacked=True,
            width=6,
        ),
        timeseries(
            "p95 duration by handler",
            "Until the last byte, so streams count whole.",
            [Query(f"histogram_quantile(0.95, sum by (le, handler) ({durations}))", "{{handler}}")],
            unit="s",
            width=6,
        ),
        timeseries(
            "Rejections by reason",
            "queue_full: 429, add a server or raise --max-num-waiting; unavailable: 503 while starting or stopping; "
            "the others are the callers' mistakes.",
            [Query(total_rate("admission_rejections_total", by="reason"), "{{reason}}")],
            unit="reqps",
            width=6,
        ),
    )


def _lengths() -> list[Json]:
    names = (
        ("Prompt length", "Tokens of the prompt, cached ones included.", "request_prompt_tokens"),
        ("Output length", "Tokens generated per sample.", "request_generation_tokens"),
        (
            "max_tokens asked for",
            "Of requests that set it. Far above the output length: nothing to worry about, no memory is reserved for "
            "it.",
            "request_params_max_tokens",
        ),
    )
    samples = f"{rate('request_params_n_sum')} / {rate('request_params_n_count')}"
    return row(
        "Lengths",
        *(timeseries(title, text, quantiles(name), unit="none", width=6) for title, text, name in names),
        timeseries(
            "Samples per request",
            "Mean of n.",
            [Query(samples, "{{instance}}")],
            unit="none",
            width=6,
        ),
    )
