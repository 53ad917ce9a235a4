"""Throughput and time to first token of a real server on this machine: starts `octavo serve`, measures, prints JSON.

    .venv/bin/python bench/serve_numbers.py [--concurrency 1 8 32] [--out FILE] [-- SERVE ARGUMENTS]

Prompts are random words cut to an exact number of tokens, so nothing is shared unless a case says so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

WORDS = [
    *("river", "stone", "lantern", "orchard", "winter", "harbour", "copper", "meadow", "thunder", "violet", "engine"),
    *("carpet", "shadow", "bridge", "marble", "forest", "candle", "window", "planet", "ribbon", "hammer", "falcon"),
    *("market", "garden", "silver", "island", "pepper", "rocket"),
]


async def exact_prompt(client: httpx.AsyncClient, seed: int, num_tokens: int) -> list[int]:
    words = random.Random(seed).choices(WORDS, k=2 * num_tokens)
    answer = await client.post("/tokenize", json={"prompt": " ".join(words)})
    return list(answer.json()["tokens"][:num_tokens])


async def stream(client: httpx.AsyncClient, prompt: list[int], max_tokens: int) -> tuple[float, float, int, int]:
    """(time to first token, total time, output tokens, cached prompt tokens) of one streamed completion."""
    body = {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.perf_counter()
    first = 0.0
    usage: dict[str, Any] = {}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter()
                if '"usage": {' in line or '"usage":{' in line:
                    usage = json.loads(line[6:])["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return first - started, time.perf_counter() - started, usage["completion_tokens"], cached


async def throughput(client: httpx.AsyncClient, concurrency: int, num_in: int, num_out: int, rounds: int) -> Any:
    prompts = [await exact_prompt(client, 1000 * concurrency + i, num_in) for i in range(concurrency * rounds)]
    queue = list(prompts)
    results: list[tuple[float, float, int, int]] = []

    async def worker() -> None:
        while queue:
            results.append(await stream(client, queue.pop(), num_out))

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    wall = time.perf_counter() - started
    num_tokens = sum(result[2] for result in results)
    return {
        "concurrency": concurrency,
        "requests": len(results),
        "output_tokens_per_s": round(num_tokens / wall, 1),
        "ttft_median_s": round(statistics.median(result[0] for result in results), 3),
        "tpot_median_ms": round(1e3 * statistics.median((r[1] - r[0]) / max(1, r[2] - 1) for r in results), 2),
        "wall_s": round(wall, 2),
    }


async def prefix(client: httpx.AsyncClient, num_tokens: int, repeats: int) -> Any:
    """TTFT of a prompt with a fresh prefix, and of the same prefix with another ending."""
    cold, warm, cached = [], [], []
    for repeat in range(repeats):
        prompt = await exact_prompt(client, 77_000 + repeat, num_tokens + 8)
        cold.append((await stream(client, prompt, 1))[0])
        again = await stream(client, prompt[:num_tokens] + prompt[:8], 1)
        warm.append(again[0])
        cached.append(again[3])
    return {
        "prefix_tokens": num_tokens,
        "ttft_without_hit_s": round(statistics.median(cold), 4),
        "ttft_with_hit_s": round(statistics.median(warm), 4),
        "ratio": round(statistics.median(cold) / statistics.median(warm), 2),
        "cached_tokens": statistics.median(cached),
    }


def start(arguments: list[str]) -> tuple[subprocess.Popen[str], str, list[str]]:
    command = [str(Path(sys.executable).with_name("octavo")), "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if match := re.search(r"API\s+(http://\S+)/v1", line):
            return process, match[1], lines
    raise SystemExit("the server did not start")


async def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=256)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await stream(client, await exact_prompt(client, 1, 64), 8)
        return {
            "prefix": await prefix(client, 1000, options.repeats),
            "throughput": [
                await throughput(client, concurrency, 128, 128, options.rounds) for concurrency in options.concurrency
            ],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=2, help="requests per connection")
    parser.add_argument("--repeats", type=int, default=5, help="prefix measurements")
    parser.add_argument("--out", type=Path)
    parser.add_argument("serve_arguments", nargs="*")
    options = parser.parse_args()
    process, url, lines = start(options.serve_arguments)
    try:
        result = asyncio.run(measure(url, options))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    result = {
        "command": " ".join(["bench/serve_numbers.py", *sys.argv[1:]]),
        "machine": {"cpu": cpu_name(), "cores": len_cores(), "python": platform.python_version()},
        "server": [line.strip() for line in lines if re.match(r"\s+(model|K/V|limits|ready|Llama)", line)][1:],
        **result,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


def cpu_name() -> str:
    match = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else platform.processor()


def len_cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
