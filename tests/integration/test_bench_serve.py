"""The load generator against the real server: what it counts is what the server counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from octavo.server.cli import main

if TYPE_CHECKING:
    from conftest import ServerProcess  # type: ignore[import-not-found]

pytestmark = pytest.mark.real_model

Measure = Callable[..., dict[str, Any]]


@pytest.fixture
def measure(server: ServerProcess, tmp_path: Path) -> Measure:
    """Run the command on a few short requests, and read its results."""

    def run(*arguments: str) -> dict[str, Any]:
        output, markdown = tmp_path / "results.json", tmp_path / "results.md"
        small = ["--input-tokens", "20-40", "--output-tokens", "3-6", "--warmup", "0"]
        files = ["--output", str(output), "--markdown", str(markdown)]
        assert main(["bench", "serve", "--base-url", server.url, *small, *files, *arguments]) == 0
        assert markdown.read_text("utf-8").startswith("# octavo bench serve\n")
        results: dict[str, Any] = json.loads(output.read_text("utf-8"))
        return results

    return run


def tokens(results: dict[str, Any]) -> int:
    """Of all outputs."""
    stats = [one for level in results["levels"] for one in level["servers"]]
    assert all(one["num_ok"] == one["num_requests"] for one in stats)
    return sum(round(one["output_tokens_per_s"] * one["wall_s"]) for one in stats)


def test_counts_the_tokens_that_the_server_counts(server: ServerProcess, measure: Measure) -> None:
    """Getting to know the server costs a few tokens, the same in both runs."""
    counts = [server.metric("generation_tokens_total")]
    found = []
    for num_requests in ("2", "4"):
        found.append(measure("--concurrency", "1,2", "--num-requests", num_requests))
        counts.append(server.metric("generation_tokens_total"))
    first, second = counts[1] - counts[0], counts[2] - counts[1]
    assert first - tokens(found[0]) == second - tokens(found[1]) > 0
    for level in found[1]["levels"]:
        (stats,) = level["servers"]
        assert (stats["input"]["exact"], stats["output"]["exact"]) == (True, True)
    (facts,) = found[1]["servers"]
    assert (facts["prompts_as"], facts["counts_tokens_per_chunk"]) == ("token ids", True)
    assert facts["cache_config"]["block_size"] == "32"
    assert facts["notes"] == []


def test_chats_have_the_planned_length_and_shared_prefixes_hit_the_cache(measure: Measure) -> None:
    results = measure(
        *("--endpoint", "chat", "--concurrency", "1", "--num-requests", "3"),
        *("--input-tokens", "160", "--shared-prefix", "0.8"),
    )
    (stats,) = results["levels"][0]["servers"]
    assert stats["input"] == {"planned_mean": 160.0, "mean": 160.0, "exact": True}
    assert stats["cached_share"] >= 0.4


def test_an_open_loop_without_streaming(measure: Measure) -> None:
    results = measure("--rate", "50", "--num-requests", "4", "--no-stream")
    (stats,) = results["levels"][0]["servers"]
    assert stats["e2e"]["count"] == 4
    assert stats["ttft"] is None
