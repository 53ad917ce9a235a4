"""Times launch settings of the attention kernels on this GPU and keeps the best in kernels/triton/tuning.json.

    .venv/bin/python bench/sweep.py --head-dim 128 --group 4 --kv-heads 8        one shape, a few minutes
    .venv/bin/python bench/sweep.py ... --chunks 256 512 1024                    also chooses the chunk length
    .venv/bin/python bench/sweep.py --dry-run                                    tiny, interpreted, writes nothing

Every setting runs the same work and must give the same output within rounding; the best is the one whose times, each
over the best time of its work, have the least product. A chunk length is kept for all cards and changes how results
round, so it is only chosen where asked for. --out keeps every time measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from octavo.kernels.backend import AttentionSpec
from octavo.kernels.triton import tuning
from octavo.kernels.triton.decode import DecodeConfig, DecodeWorkspace, list_chunks, max_splits, paged_decode
from octavo.kernels.triton.prefill import PrefillConfig, paged_prefill, prefill_tiles

TABLE = Path(tuning.__file__).with_name("tuning.json")
Settings = dict[str, int]


@dataclass(frozen=True, slots=True)
class Work:
    """`rows` sequences that hold `kv_len` tokens, the last `queries` of which are computed."""

    rows: int
    kv_len: int
    queries: int = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What is tried on what."""

    decode_work: Sequence[Work]
    prefill_work: Sequence[Work]
    decode_grid: Mapping[str, Sequence[int]]
    prefill_grid: Mapping[str, Sequence[int]]
    repeats: int
    bytes_between: int
    """K/V read before any are read again: more than the second-level cache holds."""


REAL = Plan(
    decode_work=(Work(1, 4096), Work(1, 32768), Work(8, 16384), Work(32, 4096), Work(256, 1024)),
    prefill_work=(Work(1, 4096, 4096), Work(4, 5120, 1024), Work(1, 33280, 512), Work(32, 128, 128)),
    # 4 and 6 stages are 3 and 5 again: a stage more per load of a chain of two.
    decode_grid={"tile": (16, 32, 64, 128), "num_warps": (2, 4, 8), "num_stages": (3, 5, 7)},
    prefill_grid={"rows": (64, 128), "tile": (32, 64, 128), "num_warps": (4, 8), "num_stages": (3, 5)},
    repeats=20,
    bytes_between=256 << 20,
)
DRY = Plan(
    decode_work=(Work(2, 40), Work(1, 70)),
    prefill_work=(Work(1, 24, 20),),
    decode_grid={"tile": (16, 32), "num_warps": (4,), "num_stages": (3,)},
    prefill_grid={"rows": (16,), "tile": (16, 32), "num_warps": (4,), "num_stages": (3,)},
    repeats=1,
    bytes_between=0,
)


@dataclass(frozen=True, slots=True)
class Pools:
    """Inputs of one work. Layers are taken in turn, blocks lie in random order."""

    q: torch.Tensor  # [num_tokens, num_heads, head_dim]
    layers: Sequence[torch.Tensor]  # [num_blocks, 2, num_kv_heads, block_size, head_dim]
    block_tables: torch.Tensor  # int32 [rows, blocks]
    kv_lens: torch.Tensor  # int32 [rows]
    query_starts: torch.Tensor  # int32 [rows + 1]
    out: torch.Tensor  # [num_tokens, num_heads * head_dim]

    @classmethod
    def of(cls, work: Work, spec: AttentionSpec, options: argparse.Namespace, plan: Plan) -> Pools:
        device, dtype, block = options.device, getattr(torch, options.dtype), options.block
        per_row = -(-work.kv_len // block)
        shape = (work.rows * per_row + 1, 2, spec.num_kv_heads, block, spec.head_dim)
        count = max(1, min(64, -(-plan.bytes_between // (math.prod(shape) * dtype.itemsize))))
        order = torch.randperm(work.rows * per_row, device=device).to(torch.int32) + 1
        num_tokens, heads = work.rows * work.queries, spec.num_heads
        return cls(
            torch.randn(num_tokens, heads, spec.head_dim, device=device, dtype=dtype),
            [torch.randn(shape, device=device, dtype=dtype) for _ in range(count)],
            order.view(work.rows, per_row),
            torch.full((work.rows,), work.kv_len, dtype=torch.int32, device=device),
            torch.arange(work.rows + 1, dtype=torch.int32, device=device) * work.queries,
            torch.empty(num_tokens, heads * spec.head_dim, device=device, dtype=dtype),
        )


def decode_launches(work: Work, pools: Pools, spec: AttentionSpec, settings: Settings) -> list[Callable[[], None]]:
    config = DecodeConfig(**settings)
    splits = max_splits(work.kv_len, spec.window, config.chunk)
    space = DecodeWorkspace.allocate(work.rows, splits, spec, pools.q.device)
    # Once for all layers, as in a step.
    list_chunks(pools.kv_lens, space, spec, config)
    return [
        lambda layer=layer: paged_decode(  # type: ignore[misc]
            pools.q, layer, pools.block_tables, pools.kv_lens, pools.out, space, spec, config, listed=True
        )
        for layer in pools.layers
    ]


def prefill_launches(work: Work, pools: Pools, spec: AttentionSpec, settings: Settings) -> list[Callable[[], None]]:
    config = PrefillConfig(**settings)
    tiles = prefill_tiles([work.queries] * work.rows, 0, spec, config)
    rows, firsts = (torch.from_numpy(part).to(pools.q.device) for part in (tiles.rows, tiles.firsts))
    return [
        lambda layer=layer: paged_prefill(  # type: ignore[misc]
            pools.q, layer, pools.block_tables, pools.kv_lens, pools.query_starts, rows, firsts, pools.out, spec, config
        )
        for layer in pools.layers
    ]


def seconds_per_launch(launches: Sequence[Callable[[], None]], repeats: int, device: torch.device) -> float:
    """Median over rounds of all launches, which are queued at once, so that the host's part hides behind the card's."""
    rounds = []
    for _ in range(repeats):
        if device.type != "cuda":
            started = time.perf_counter()
            launches[0]()
            rounds.append(time.perf_counter() - started)
            continue
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # Work of about a millisecond, during which the launches queue up.
        torch.cuda._sleep(2_000_000)
        begin.record()
        for launch in launches:
            launch()
        end.record()
        end.synchronize()
        rounds.append(begin.elapsed_time(end) * 1e-3 / len(launches))
    return statistics.median(rounds)


def candidates(grid: Mapping[str, Sequence[int]], chunks: Sequence[int], group: int) -> Iterator[Settings]:
    """Settings that the kernels take. Without `chunks`: of prefill."""
    for values in product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        if not chunks and settings["rows"] >= group:
            yield settings
        yield from ({**settings, "chunk": chunk} for chunk in chunks if chunk % settings["tile"] == 0)


def sweep(kernel: str, spec: AttentionSpec, options: argparse.Namespace, plan: Plan) -> list[dict[str, Any]]:
    """Seconds of every setting on every work; one that the card refuses, or that is wrong, is named and left out."""
    decode = kernel == "decode"
    make = decode_launches if decode else prefill_launches
    grid, works = (plan.decode_grid, plan.decode_work) if decode else (plan.prefill_grid, plan.prefill_work)
    times: dict[tuple[tuple[str, int], ...], list[float]] = {}
    tried = list(candidates(grid, options.chunks if decode else (), spec.num_heads // spec.num_kv_heads))
    for work in works:
        pools, expected = Pools.of(work, spec, options, plan), None
        for settings in tried:
            launches = make(work, pools, spec, settings)
            try:
                launches[0]()
                got = pools.out.clone()
                expected = got if expected is None else expected
                torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
                seconds = seconds_per_launch(launches, plan.repeats, options.device)
            except Exception as error:
                print(f"{kernel} {settings} on {work}: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            times.setdefault(tuple(settings.items()), []).append(seconds)
            print(f"{kernel} {work} {settings}: {1e6 * seconds:.1f} µs", file=sys.stderr, flush=True)
    return [{"settings": dict(key), "seconds": found} for key, found in times.items() if len(found) == len(works)]


def best(measured: Sequence[Mapping[str, Any]]) -> Settings:
    """The settings of the least product of times; the first of equals. Where nothing ran: SystemExit."""
    if not measured:
        raise SystemExit("no setting ran on all of the work")
    chosen = min(measured, key=lambda item: sum(map(math.log, item["seconds"])))
    return dict(chosen["settings"])


def merged(document: Mapping[str, Any], kernel: str, key: tuning.Key, settings: Settings) -> dict[str, Any]:
    """The table with a measured entry, in the place of an earlier one of its key. ValueError where `parse` says so."""
    names = {name: [getattr(key, name)] for name in ("head_dim", "block", "group", "dtype", "capability")}
    chunk = settings.get("chunk", document["default_chunk"])
    entry = {**names, **{name: value for name, value in settings.items() if name != "chunk"}, "source": "measured"}
    others = [
        item
        for item in document[kernel]
        if item["source"] != "measured" or any(item[name] != value for name, value in names.items())
    ]
    found = {**document, kernel: [*others, entry]}
    if kernel == "decode":
        chunks = [c for c in document["chunks"] if (c["head_dim"], c["group"]) != (key.head_dim, key.group)]
        if chunk != document["default_chunk"]:
            chunks.append({"head_dim": key.head_dim, "group": key.group, "chunk": chunk})
        found["chunks"] = chunks
    tuning.parse(found)
    return found


def as_text(document: Mapping[str, Any]) -> str:
    """JSON with one entry per line."""
    lists = []
    for name in ("chunks", "decode", "prefill"):
        lines = ",\n".join(f"  {json.dumps(item)}" for item in document[name])
        lists.append(f' "{name}": [\n{lines}\n ]' if lines else f' "{name}": []')
    return "{\n" + ",\n".join([f' "default_chunk": {document["default_chunk"]}', *lists]) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--group", type=int, default=4, help="query heads per K/V head")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--chunks", type=int, nargs="+", help="chunk lengths to choose from; without: the table's own")
    parser.add_argument("--kernels", nargs="+", choices=("decode", "prefill"), default=("decode", "prefill"))
    parser.add_argument("--out", type=Path, help="a JSON file for every time measured")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    plan, capability = REAL, (9, 0)
    if options.dry_run:
        plan, options.head_dim, options.group, options.kv_heads, options.block = DRY, 16, 2, 1, 16
        options.dtype, options.chunks = "float16", options.chunks or [32, 64]
    elif not torch.cuda.is_available():
        parser.error("there is no GPU here; --dry-run needs none")
    else:
        capability = torch.cuda.get_device_capability()
    options.device = torch.device("cpu" if options.dry_run else "cuda")
    spec = AttentionSpec(options.group * options.kv_heads, options.kv_heads, options.head_dim, options.head_dim**-0.5)
    key = tuning.Key.of(spec, options.block, getattr(torch, options.dtype), capability)
    document = json.loads(TABLE.read_text(encoding="utf-8"))
    options.chunks = options.chunks or [tuning.shipped().chunk(key)]
    results = {}
    for kernel in options.kernels:
        results[kernel] = sweep(kernel, spec, options, plan)
        chosen = best(results[kernel])
        print(f"{kernel} {key}: {chosen}")
        document = merged(document, kernel, key, chosen)
    if options.out:
        device = "interpreter" if options.dry_run else torch.cuda.get_device_name()
        content = {"command": " ".join(["bench/sweep.py", *sys.argv[1:]]), "device": device, "key": str(key), **results}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if not options.dry_run:
        TABLE.write_text(as_text(document), encoding="utf-8")


if __name__ == "__main__":
    main()
