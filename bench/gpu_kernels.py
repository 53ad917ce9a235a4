"""Every kernel on fresh random inputs against a reference in fp64, and what those that only move memory reach.

Outputs are NaN before a launch, and so is everything that a kernel may not read: it would show in the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from gpu_around import rope_cases, row_cases, sampling_cases
from gpu_measure import ERROR_LIMITS, Row, Setting, State, attempt, relative_error, time_calls
from gpu_paged import Paged, Shape, poisoned_launch
from gpu_quantized import quantized_cases
from gpu_trial import Case, Trial, dtypes
from octavo.kernels.triton.decode import DecodeConfig, DecodeWorkspace, list_chunks, max_splits, paged_decode
from octavo.kernels.triton.prefill import PrefillConfig, paged_prefill, prefill_tiles
from octavo.kernels.triton.tuning import decode_config, prefill_config

SHAPES = (
    Shape("GQA 128", 32, 8, 128),
    Shape("GQA 64", 32, 8, 64),
    Shape("group of 3", 9, 3, 64),
    Shape("MHA 128", 8, 8, 128),
    Shape("MHA 80", 8, 8, 80),
    Shape("GQA 96", 8, 4, 96),
    Shape("MQA 256, window 512", 4, 1, 256, window=512),
    Shape("GQA 256, window, cap", 16, 8, 256, window=700, soft_cap=50.0),
    Shape("wide group", 40, 2, 128),
)
DRY_SHAPES = (Shape("GQA 16", 4, 2, 16), Shape("MHA 16, window, cap", 2, 2, 16, window=20, soft_cap=5.0))
CONTEXTS = (1, 15, 16, 17, 63, 64, 65, 511, 512, 513, 700, 1000, 2100, 5000)
"""Around the edges of blocks, tiles and chunks."""
DRY_CONTEXTS = (1, 16, 70)
CHUNKS = ((1, 1), (33, 33), (128, 128), (300, 300), (16, 48), (1, 700), (257, 1500))
"""(queries, context) of prefill rows."""
DRY_CHUNKS = ((1, 1), (5, 40))
BLOCKS = (16, 32, 64)


def run(state: State) -> Iterator[Row]:
    setting = state.setting
    cases = [*row_cases(setting), *rope_cases(setting), *sampling_cases(setting), *attention_cases(setting)]
    for number, case in enumerate(cases):
        if state.clock.left <= 0:
            yield Row("kernels", case.name, notes=["skipped: out of time"])
            continue
        yield attempt(Row("kernels", case.name, unit="GB/s"), lambda row, n=number, c=case: _measure(row, c, n, state))  # type: ignore[misc]
    yield from quantized_cases(state)


def _measure(row: Row, case: Case, number: int, state: State) -> None:
    setting = state.setting
    generator = setting.generator(100 + number)
    trial = case.make(generator)
    trial.run()
    row.check(trial.error(), case.limit)
    if row.failure or not case.timed:
        return
    trials = [trial, *(case.make(generator) for _ in range(setting.num_sets(trial.num_bytes) - 1))]
    timing = time_calls([trial.run for trial in trials], setting)
    row.seconds, row.rate = timing.median, trial.num_bytes / timing.median / 1e9
    row.fraction = trial.num_bytes / timing.median / state.ceilings.copy


# ---- Attention -------------------------------------------------------------------------------------------------------


def launch_decode(paged: Paged, config: DecodeConfig) -> Callable[[], None]:
    """With a workspace of its own, NaN at first."""
    rows = len(paged.context_lens)
    splits = max_splits(max(paged.context_lens), paged.spec.window, config.chunk)
    workspace = DecodeWorkspace.allocate(rows, splits, paged.spec, paged.q.device)
    workspace.partial.fill_(math.nan)
    workspace.lse.fill_(math.nan)
    # Once a step, for all its layers: no part of a layer's time.
    list_chunks(paged.kv_lens, workspace, paged.spec, config)
    return lambda: paged_decode(
        paged.q, paged.layer, paged.block_tables, paged.kv_lens, paged.out, workspace, paged.spec, config, listed=True
    )


def launch_prefill(paged: Paged, config: PrefillConfig) -> Callable[[], None]:
    tiles = prefill_tiles(paged.query_lens, 0, paged.spec, config)
    rows, firsts = (torch.from_numpy(part).to(paged.q.device) for part in (tiles.rows, tiles.firsts))
    return lambda: paged_prefill(
        paged.q, paged.layer, paged.block_tables, paged.kv_lens, paged.query_starts, rows, firsts, paged.out,
        paged.spec, config
    )  # fmt: skip


def attention_error(paged: Paged, rows: Sequence[int], most_queries: int = 8) -> float:
    """Over the first, the last and some queries between them of the given rows."""
    found, expected = [], []
    for row in rows:
        count = paged.query_lens[row]
        queries = sorted({round(i * (count - 1) / max(1, most_queries - 1)) for i in range(most_queries)})
        found += [paged.out[paged.starts[row] + query] for query in queries]
        expected.append(paged.expected(row, queries))
    return relative_error(torch.stack(found), torch.cat(expected))


def attention_cases(setting: Setting) -> Iterator[Case]:
    blocks = (16,) if setting.dry else BLOCKS
    shapes = DRY_SHAPES if setting.dry else SHAPES
    for dtype, count in dtypes(setting):
        for index, shape in enumerate(shapes[:count]):
            block = blocks[index % len(blocks)]
            label = f"{shape.name}, block {block}, {str(dtype).removeprefix('torch.')}"
            yield Case(f"decode {label}", _decode(setting, shape, block, dtype), ERROR_LIMITS[dtype], timed=False)
            yield Case(f"prefill {label}", _prefill(setting, shape, block, dtype), ERROR_LIMITS[dtype], timed=False)


def _decode(setting: Setting, shape: Shape, block: int, dtype: torch.dtype) -> Callable[[torch.Generator], Trial]:
    contexts = DRY_CONTEXTS if setting.dry else CONTEXTS

    def make(generator: torch.Generator) -> Trial:
        paged = poisoned_launch(shape.spec, [1] * len(contexts), contexts, block, dtype, generator)
        config = decode_settings(setting, shape, block, dtype)
        rows = range(len(contexts))
        return Trial(launch_decode(paged, config), lambda: attention_error(paged, rows), paged.read_bytes())

    return make


def _prefill(setting: Setting, shape: Shape, block: int, dtype: torch.dtype) -> Callable[[torch.Generator], Trial]:
    chunks = DRY_CHUNKS if setting.dry else CHUNKS

    def make(generator: torch.Generator) -> Trial:
        lens = [queries for queries, _ in chunks], [context for _, context in chunks]
        paged = poisoned_launch(shape.spec, *lens, block, dtype, generator)
        config = prefill_settings(setting, shape, block, dtype)
        rows = range(len(chunks))

        def error() -> float:
            return math.inf if paged.out.isnan().any() else attention_error(paged, rows)

        return Trial(launch_prefill(paged, config), error, paged.read_bytes())

    return make


def decode_settings(setting: Setting, shape: Shape, block: int, dtype: torch.dtype) -> DecodeConfig:
    """What serving would launch; a dry run splits short contexts too."""
    return (
        DecodeConfig(chunk=32, tile=16) if setting.dry else decode_config(shape.spec, block, dtype, setting.capability)
    )


def prefill_settings(setting: Setting, shape: Shape, block: int, dtype: torch.dtype) -> PrefillConfig:
    tiny = PrefillConfig(rows=16, tile=16)
    return tiny if setting.dry else prefill_config(shape.spec, block, dtype, setting.capability)
