"""Paged decode and prefill kernels under the interpreter, against attention written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.kernels.backend import AttentionSpec
from octavo.kernels.triton import decode as decode_module
from octavo.kernels.triton.decode import DecodeConfig, DecodeWorkspace, list_chunks, max_splits, paged_decode
from octavo.kernels.triton.prefill import PrefillConfig, paged_prefill, prefill_tiles
from paged import TOLERANCE, Paged, relative_error

DECODE = DecodeConfig(chunk=32, tile=16)
PREFILL = PrefillConfig(rows=32, tile=32)
EXAMPLES = settings(max_examples=4, deadline=None)


def spec(heads: int, kv_heads: int, head_dim: int, window: int = 0, soft_cap: float = 0.0) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5, window=window, soft_cap=soft_cap)


def decode(paged: Paged, config: DecodeConfig = DECODE, splits: int | None = None) -> torch.Tensor:
    rows = len(paged.context_lens)
    splits = splits or max_splits(max(paged.context_lens), paged.spec.window, config.chunk)
    workspace = DecodeWorkspace.allocate(rows, splits, paged.spec, torch.device("cpu"))
    workspace.partial.fill_(math.nan)
    workspace.lse.fill_(math.nan)
    out = torch.full((rows, paged.spec.num_heads * paged.spec.head_dim), math.nan, dtype=paged.dtype)
    paged_decode(paged.q, paged.layer, paged.block_tables, paged.kv_lens, out, workspace, paged.spec, config)
    return out


def prefill(paged: Paged, first_row: int = 0, config: PrefillConfig = PREFILL) -> torch.Tensor:
    tiles = prefill_tiles(paged.query_lens, first_row, paged.spec, config)
    out = torch.full((paged.q.shape[0], paged.spec.num_heads * paged.spec.head_dim), math.nan, dtype=paged.dtype)
    paged_prefill(
        paged.q, paged.layer, paged.block_tables, paged.kv_lens, paged.query_starts, torch.from_numpy(tiles.rows),
        torch.from_numpy(tiles.firsts), out, paged.spec, config,
    )  # fmt: skip
    return out


SHAPES = {
    "group_of_three": spec(6, 2, 64),
    "mha_80": spec(2, 2, 80),
    "mqa_256": spec(4, 1, 256),
    "gqa_96_window": spec(4, 2, 96, window=17),
    "soft_cap": spec(4, 1, 64, soft_cap=5.0),
    "window_and_cap": spec(2, 1, 64, window=25, soft_cap=20.0),
    "mha_window": spec(2, 2, 64, window=35),
    "wide_group": spec(18, 1, 64),
}
FP16 = [pytest.param(name, torch.float16, id=f"{name}-fp16") for name in ("group_of_three", "mha_80", "window_and_cap")]
"""fp16 takes other instructions than fp32, but not by shape."""
SHAPES_AND_DTYPES = [*(pytest.param(name, torch.float32, id=f"{name}-fp32") for name in SHAPES), *FP16]


@pytest.mark.parametrize(("name", "dtype"), SHAPES_AND_DTYPES)
def test_decode_equals_attention_written_out(name: str, dtype: torch.dtype) -> None:
    # One token; around a block's, a tile's and a chunk's edge; several chunks.
    contexts = [1, 15, 16, 17, 32, 33, 75]
    paged = Paged(SHAPES[name], [1] * len(contexts), contexts, block_size=16, dtype=dtype)
    assert relative_error(decode(paged), paged.expected()) < TOLERANCE[dtype]


@pytest.mark.parametrize(("name", "dtype"), SHAPES_AND_DTYPES)
def test_prefill_equals_attention_written_out(name: str, dtype: torch.dtype) -> None:
    # Fresh prompts, chunks over a prefix in the pool, a single query, lengths at edges.
    rows = [(1, 1), (33, 33), (1, 45), (12, 65)] if name != "wide_group" else [(3, 3), (2, 34)]
    paged = Paged(SHAPES[name], [q for q, _ in rows], [c for _, c in rows], block_size=16, dtype=dtype)
    assert relative_error(prefill(paged), paged.expected()) < TOLERANCE[dtype]


@EXAMPLES
@given(
    contexts=st.lists(st.integers(1, 100), min_size=1, max_size=3),
    block_size=st.sampled_from([16, 32, 64]),
    window=st.sampled_from([0, 1, 16, 40, 65]),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    seed=st.integers(0, 2**16),
)
def test_decode_over_any_lengths_tables_and_windows(
    contexts: list[int], block_size: int, window: int, heads: tuple[int, int], seed: int
) -> None:
    paged = Paged(spec(*heads, 16, window), [1] * len(contexts), contexts, block_size, torch.float32, seed)
    assert relative_error(decode(paged), paged.expected()) < TOLERANCE[torch.float32]


@EXAMPLES
@given(
    rows=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=2),
    block_size=st.sampled_from([16, 32, 64]),
    window=st.sampled_from([0, 1, 16, 40, 65]),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    seed=st.integers(0, 2**16),
)
def test_prefill_over_any_lengths_tables_and_windows(
    rows: list[tuple[int, int]], block_size: int, window: int, heads: tuple[int, int], seed: int
) -> None:
    queries = [q for q, _ in rows]
    paged = Paged(spec(*heads, 16, window), queries, [q + p for q, p in rows], block_size, torch.float32, seed)
    assert relative_error(prefill(paged), paged.expected()) < TOLERANCE[torch.float32]


def test_a_sequence_decodes_to_the_same_bits_in_any_company() -> None:
    shape = spec(4, 2, 32)
    contexts = [100, 3, 32, 65]
    together = Paged(shape, [1] * 4, contexts, 16, torch.float32)
    alone = decode(together)
    for row, context in enumerate(contexts):
        one = Paged(shape, [1], [context], 16, torch.float32)
        one.layer, one.q = together.layer, together.q[row : row + 1]
        one.block_tables = together.block_tables[row : row + 1]
        # A launch captured for longer sequences has more splits, which leave at once.
        for splits in (max_splits(context, 0, DECODE.chunk), 6):
            assert torch.equal(decode(one, splits=splits)[0], alone[row])


def test_a_program_takes_as_many_units_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    paged = Paged(spec(4, 2, 32), [1, 1, 1], [70, 5, 64], 16, torch.float32)
    expected = decode(paged)
    monkeypatch.setattr(decode_module, "_MAX_PROGRAMS", 3)  # for twelve units
    assert torch.equal(decode(paged), expected)


@pytest.mark.parametrize("window", [0, 20])
def test_chunks_are_listed_once_each_in_the_order_of_rows(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Fewer at a time than there are, of rows and of chunks.
    monkeypatch.setattr(decode_module, "_LISTED_ROWS", 4)
    monkeypatch.setattr(decode_module, "_LISTED_CHUNKS", 2)
    lens = [1, 0, 32, 33, 100, 0, 160, 64]
    workspace = DecodeWorkspace.allocate(len(lens), 5, spec(4, 2, 32, window), torch.device("cpu"))
    list_chunks(torch.tensor(lens, dtype=torch.int32), workspace, spec(4, 2, 32, window), DECODE)
    counts = [-(-length // 32) - (max(0, length - window) // 32 if window else 0) for length in lens]
    starts = workspace.chunk_starts.tolist()
    assert starts == [sum(counts[:row]) for row in range(len(lens) + 1)]
    listed = [(chunk >> 32, chunk & 0x7FFFFFFF) for chunk in workspace.chunks[: starts[-1]].tolist()]
    assert listed == [(row, split) for row, count in enumerate(counts) for split in range(count)]


def test_rows_without_a_sequence_are_left_alone() -> None:
    paged = Paged(spec(4, 2, 32), [1, 1, 1], [70, 5, 64], 16, torch.float32)
    expected = decode(paged)
    paged.kv_lens[1] = 0
    found = decode(paged)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_prefill_touches_only_the_rows_of_its_tiles() -> None:
    paged = Paged(spec(4, 2, 32), [1, 20, 3], [50, 20, 40], 16, torch.float32)
    found = prefill(paged, first_row=1)
    assert found[0].isnan().all()
    assert relative_error(found[1:], paged.expected()[1:]) < TOLERANCE[torch.float32]


def test_padded_tiles_of_a_captured_launch_write_nothing() -> None:
    paged = Paged(spec(4, 2, 32), [20], [20], 16, torch.float32)
    out = torch.full((20, 128), math.nan)
    paged_prefill(
        paged.q, paged.layer, paged.block_tables, paged.kv_lens, paged.query_starts,
        torch.tensor([-1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32), out, paged.spec, PREFILL,
    )  # fmt: skip
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("length", "window", "splits"),
    [(1, 0, 1), (64, 0, 1), (65, 0, 2), (999, 64, 2), (999, 66, 3), (10, 500, 1)],
)
def test_number_of_splits_covers_what_a_window_can_touch(length: int, window: int, splits: int) -> None:
    assert max_splits(length, window, 64) == splits


def test_tiles_name_every_query_once() -> None:
    shape = spec(6, 2, 64)
    tiles = prefill_tiles([1, 1, 25, 10, 11], 2, shape, PREFILL)
    per_tile = PREFILL.rows // 3
    assert list(zip(tiles.rows.tolist(), tiles.firsts.tolist(), strict=True)) == [
        (2, 0), (2, per_tile), (2, 2 * per_tile), (3, 0), (4, 0), (4, per_tile),
    ]  # fmt: skip
