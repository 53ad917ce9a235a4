"""`octavo bench serve` against an `octavo serve` that this script starts, and what a prefix-cache hit saves.

    .venv/bin/python bench/serve_numbers.py [--bench="--concurrency 1,8,32"] [--out FILE] [-- SERVE ARGUMENTS]

Writes the JSON of `octavo bench serve` with two keys more: `banner`, what the server said of itself, and `prefix`, the
time to first token of a prompt whose beginning is new, and of one whose beginning the server has seen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from octavo.server.bench.load_client import Record, open_session
from octavo.server.bench.load_probe import Target, get_to_know_all
from octavo.server.bench.load_settings import read_settings
from octavo.server.bench.load_stats import ttft_s
from octavo.server.bench.load_workload import PlannedRequest, TokenPieces

OCTAVO = str(Path(sys.executable).with_name("octavo"))


async def first_token(target: Target, prompt: list[int]) -> tuple[float, Record]:
    """Time to first token in seconds, and the whole record, of a request for one token."""
    request = PlannedRequest(prompt, len(prompt), 1)
    record = await target.client.send(request, target.client.body(request))
    seconds = ttft_s(record)
    if seconds is None:
        raise SystemExit(f"{record.error_kind}: {record.error_message}")
    return seconds, record


async def prefix(url: str, num_tokens: int, repeats: int) -> dict[str, Any]:
    """TTFT of a prompt with a fresh prefix, and of the same prefix with another ending; medians."""
    cold, warm, cached = [], [], []
    async with open_session() as session:
        (target,) = await get_to_know_all(read_settings({"base_url": url}), session)
        assert isinstance(target.maker, TokenPieces)
        rng = random.Random()
        for _ in range(repeats):
            prompt = target.maker.make(num_tokens + 8, 0, rng, rng)
            cold.append((await first_token(target, prompt))[0])
            seconds, record = await first_token(target, prompt[:num_tokens] + prompt[:8])
            warm.append(seconds)
            cached.append(record.usage.cached_tokens or 0)
    return {
        "prefix_tokens": num_tokens,
        "repeats": repeats,
        "ttft_without_hit_s": round(statistics.median(cold), 4),
        "ttft_with_hit_s": round(statistics.median(warm), 4),
        "ratio": round(statistics.median(cold) / statistics.median(warm), 2),
        "cached_tokens": statistics.median(cached),
    }


def start(arguments: list[str]) -> tuple[subprocess.Popen[str], str, list[str]]:
    """The server's process, its URL and the lines of its banner."""
    process = subprocess.Popen([OCTAVO, "serve", "--port", "0", *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if match := re.search(r"API\s+(http://\S+)/v1", line):
            return process, match[1], lines
    raise SystemExit("the server did not start")


def load(url: str, arguments: list[str]) -> dict[str, Any]:
    """The results of `octavo bench serve`, whose tables go to this terminal."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        subprocess.run([OCTAVO, "bench", "serve", "--base-url", url, "--output", path, *arguments], check=True)
        results: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", default="", metavar="ARGUMENTS", help="for `octavo bench serve`")
    parser.add_argument("--repeats", type=int, default=5, help="prefix measurements")
    parser.add_argument("--out", type=Path)
    parser.add_argument("serve_arguments", nargs="*")
    options = parser.parse_args()
    process, url, lines = start(options.serve_arguments)
    try:
        results = load(url, shlex.split(options.bench))
        results["prefix"] = asyncio.run(prefix(url, 1000, options.repeats))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    results["command"] = shlex.join(["bench/serve_numbers.py", *sys.argv[1:]])
    results["banner"] = [line.strip() for line in lines if re.match(r"\s+(K/V|limits|ready|\w+ForCausalLM)", line)]
    print(json.dumps(results["prefix"], indent=2))
    if options.out:
        options.out.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
