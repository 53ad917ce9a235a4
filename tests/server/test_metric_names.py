"""The names, labels and buckets that dashboards rely on, and that docs/metrics.md describes what is there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from http_fakes import READY, FakeEngineClient, chat, make_app, serving
from octavo.server.engine.client import EngineState
from octavo.server.engine.messages import StepStats
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.anyio
DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"

LATENCY = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
TTFT = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
ITL = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80"
FINE_ITL = "0.0005 0.001 0.002 0.003 0.004 0.005 0.006 0.008 " + ITL
ITERATION = "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384"
SMALL = "1 2 5 10 20"
LENGTHS = "1 2 5 10 20 50 100 200 500"
"""Up to the fake engine's context of 512 tokens."""
CACHE_CONFIG = ("block_size", "cache_dtype", "enable_prefix_caching", "kv_cache_bytes", "num_blocks", "num_gpu_blocks")

# vLLM's metrics that exist here: type, labels besides model_name and engine, buckets.
SHARED: dict[str, tuple[str, dict[str, str], str]] = {
    "num_requests_running": ("gauge", {}, ""),
    "num_requests_waiting": ("gauge", {}, ""),
    "num_requests_waiting_by_reason": ("gauge", {"reason": "capacity deferred"}, ""),
    "kv_cache_usage_perc": ("gauge", {}, ""),
    "cache_config_info": (
        "gauge",
        dict.fromkeys(
            ["block_size", "cache_dtype", "enable_prefix_caching", "kv_cache_bytes", "num_blocks", "num_gpu_blocks"],
            "*",
        ),
        "",
    ),
    "prefix_cache_queries": ("counter", {}, ""),
    "prefix_cache_hits": ("counter", {}, ""),
    "num_preemptions": ("counter", {}, ""),
    "prompt_tokens": ("counter", {}, ""),
    "prompt_tokens_by_source": ("counter", {"source": "local_cache_hit local_compute"}, ""),
    "prompt_tokens_cached": ("counter", {}, ""),
    "generation_tokens": ("counter", {}, ""),
    "request_success": ("counter", {"finished_reason": "abort error length stop"}, ""),
    "e2e_request_latency_seconds": ("histogram", {}, LATENCY),
    "request_queue_time_seconds": ("histogram", {}, LATENCY),
    "request_inference_time_seconds": ("histogram", {}, LATENCY),
    "request_prefill_time_seconds": ("histogram", {}, LATENCY),
    "request_decode_time_seconds": ("histogram", {}, LATENCY),
    "time_to_first_token_seconds": ("histogram", {}, TTFT),
    "inter_token_latency_seconds": ("histogram", {}, FINE_ITL),
    "request_time_per_output_token_seconds": ("histogram", {}, FINE_ITL),
    "request_prompt_tokens": ("histogram", {}, LENGTHS),
    "request_generation_tokens": ("histogram", {}, LENGTHS),
    "request_max_num_generation_tokens": ("histogram", {}, LENGTHS),
    "request_params_max_tokens": ("histogram", {}, LENGTHS),
    "request_prefill_kv_computed_tokens": ("histogram", {}, LENGTHS),
    "iteration_tokens_total": ("histogram", {}, ITERATION),
    "request_params_n": ("histogram", {}, SMALL),
}
OURS: dict[str, tuple[str, dict[str, str], str]] = {
    "admission_rejections": (
        "counter",
        {"reason": "context_length_exceeded invalid_request model_not_found queue_full unavailable"},
        "",
    ),
    "engine_last_message_age_seconds": ("gauge", {}, ""),
    "engine_resident_memory_bytes": ("gauge", {}, ""),
    "engine_restarts": ("counter", {}, ""),
    "engine_steps": ("counter", {}, ""),
    "engine_up": ("gauge", {}, ""),
    "kv_blocks": ("gauge", {"state": "active cached free shared"}, ""),
    "kv_blocks_evicted": ("counter", {}, ""),
    "kv_cache_bytes": ("gauge", {}, ""),
    "model_weights_bytes": ("gauge", {}, ""),
    "prefix_cache_misses": ("counter", {"reason": "evicted new tail"}, ""),
    "recomputed_tokens": ("counter", {}, ""),
    "request_num_preemptions": ("histogram", {}, SMALL),
    "step_seconds": ("counter", {"phase": "emit forward sample schedule update"}, ""),
}
HTTP = {"http_requests": "counter", "http_request_duration_seconds": "histogram"}
NOT_THERE = ("lora_requests_info", "spec_decode_num_drafts", "spec_decode_num_draft_tokens")


async def families(http: httpx.AsyncClient) -> dict[str, Metric]:
    """What the server exposes, by name, without prometheus_client's own of the process."""
    text = (await http.get("/metrics")).text
    parsed = list(text_string_to_metric_families(text))
    names = [family.name for family in parsed]
    assert len(set(names)) == len(names), "a family is there twice"
    return {family.name: family for family in parsed if not family.name.startswith("process_")}


def bounds(family: Metric) -> list[str]:
    return [sample.labels["le"] for sample in family.samples if sample.name.endswith("_bucket")]


def own_labels(family: Metric) -> dict[str, set[str]]:
    """Label → its values, without those that every metric has."""
    found: dict[str, set[str]] = {}
    for sample in family.samples:
        for label, value in sample.labels.items():
            if label not in ("model_name", "engine", "le"):
                found.setdefault(label, set()).add(value)
    return found


@pytest.mark.parametrize("prefix", ["octavo:", "vllm:"])
async def test_names_types_labels_and_buckets(engine: FakeEngineClient, prefix: str) -> None:
    async with serving(make_app(engine, metrics_prefix=prefix)) as http:
        await http.post("/v1/chat/completions", json=chat(max_tokens=5))
        found = await families(http)
    table = SHARED | OURS
    assert set(found) == {prefix + name for name in table} | set(HTTP)
    assert not set(NOT_THERE) & {name.removeprefix(prefix) for name in found}
    for name, (kind, labels, buckets) in table.items():
        family = found[prefix + name]
        assert family.type == kind, name
        assert all(sample.labels["model_name"] == "fake" for sample in family.samples), name
        assert all(sample.labels["engine"] == "0" for sample in family.samples), name
        own = own_labels(family)
        assert own.keys() == labels.keys(), name
        for label, values in labels.items():
            assert values == "*" or own[label] == set(values.split()), name
        if kind == "counter":
            assert {sample.name for sample in family.samples} == {f"{prefix}{name}_total"}
        if kind == "histogram":
            assert bounds(family) == [str(float(bound)) for bound in buckets.split()] + ["+Inf"], name


def documented() -> dict[str, tuple[str, dict[str, set[str]]]]:
    """Name → type, and labels with their values where these are fixed, from the tables of docs/metrics.md."""
    found: dict[str, tuple[str, dict[str, set[str]]]] = {}
    for row in re.findall(r"^\| `.*\|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE):
        name, kind, labels, _unit, meaning = (cell.strip() for cell in row.strip("|").split("|"))
        assert name.strip("`") not in found, "a metric is described twice"
        assert meaning
        parts = re.findall(r"`(\w+)`(?:: ([\w, ]+))?", labels)
        found[name.strip("`")] = (kind, {label: set(values.replace(",", " ").split()) for label, values in parts})
    return found


async def test_the_document_describes_every_metric_and_no_other(http: httpx.AsyncClient) -> None:
    await http.post("/v1/chat/completions", json=chat(max_tokens=5))
    actual: dict[str, tuple[str, dict[str, set[str]]]] = {}
    for name, family in (await families(http)).items():
        on_wire = name + "_total" if family.type == "counter" else name
        labels = own_labels(family)
        if name in HTTP or name.endswith("_info"):
            labels = {label: set() for label in labels}
        actual[on_wire.removeprefix("octavo:")] = (family.type, labels)
    assert documented() == actual


@pytest.mark.parametrize("state", ["starting", "ready", "busy", "restarting", "ready again", "dead"])
async def test_the_exposition_is_valid_in_every_state(engine: FakeEngineClient, state: str) -> None:
    engine._ready_at_start = False
    async with serving(make_app(engine)) as http:
        await reach(engine, http, state)
        found = await families(http)
        text = (await http.get("/metrics")).text
    (up,) = found["octavo:engine_up"].samples
    assert up.value == (state in ("ready", "busy", "ready again"))
    if state != "busy":
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "kv_blocks"):
            assert all(sample.value == 0 for sample in found[f"octavo:{name}"].samples), name
    complaints = lint(text)
    # Its own naming rules, against which these names, being vLLM's, have to sin.
    assert [line for line in complaints if "should not contain ':'" not in line] == [
        'octavo:iteration_tokens_total non-counter metrics should not have "_total" suffix'
    ] or not complaints


async def reach(engine: FakeEngineClient, http: httpx.AsyncClient, state: str) -> None:
    """Go through the states of an engine up to this one."""
    if state == "starting":
        return
    engine.handle(READY)
    if state == "ready":
        return
    await http.post("/v1/chat/completions", json=chat(max_tokens=5))
    engine.stats_listeners[0](StepStats(num_running=3, num_waiting=2, num_blocks=10, num_free_blocks=5))
    if state == "busy":
        return
    engine._engine_died("it restarts", EngineState.STARTING)
    engine.num_restarts = 1
    if state == "restarting":
        return
    engine.handle(READY)
    if state == "dead":
        engine.die("for good")


def lint(text: str) -> list[str]:
    """What Prometheus's own tool says; nothing where it is not installed. A format error is an exit status of 1."""
    promtool = shutil.which("promtool")
    if promtool is None:
        return []
    result = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert result.returncode in (0, 3), result.stderr
    return result.stderr.splitlines()
