"""Paged decode and prefill kernels under the interpreter, against attention written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.kernels.backend import AttentionSpec
from octavo.kernels.triton.decode import DecodeConfig, DecodeWorkspace, max_splits, paged_decode
from octavo.kernels.triton.prefill import PrefillConfig, paged_prefill, prefill_tiles
from paged import TOLERANCE, Paged, relative_error

DECODE = DecodeConfig(chunk=64, tile=32)
PREFILL = PrefillConfig(rows=32, tile=32)
EXAMPLES = settings(max_examples=6, deadline=None)


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
    "gqa_64": spec(6, 2, 64),
    "group_of_three": spec(9, 3, 64),
    "mha_80": spec(3, 3, 80),
    "mqa_256": spec(4, 1, 256),
    "mha_128": spec(2, 2, 128),
    "gqa_96_window": spec(4, 2, 96, window=33),
    "soft_cap": spec(4, 1, 64, soft_cap=5.0),
    "window_and_cap": spec(2, 1, 64, window=50, soft_cap=20.0),
    "mha_window": spec(2, 2, 64, window=70),
    "wide_group": spec(18, 1, 64),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_decode_equals_attention_written_out(name: str, dtype: torch.dtype) -> None:
    # One token; around a block's, a tile's and a chunk's edge; several chunks.
    contexts = [1, 15, 16, 17, 32, 63, 64, 65, 150]
    paged = Paged(SHAPES[name], [1] * len(contexts), contexts, block_size=16, dtype=dtype)
    assert relative_error(decode(paged), paged.expected()) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_prefill_equals_attention_written_out(name: str, dtype: torch.dtype) -> None:
    # Fresh prompts, chunks over a prefix in the pool, a single query, lengths at edges.
    rows = [(1, 1), (5, 5), (33, 33), (16, 48), (1, 70), (40, 129)]
    paged = Paged(SHAPES[name], [q for q, _ in rows], [c for _, c in rows], block_size=16, dtype=dtype)
    assert relative_error(prefill(paged), paged.expected()) < TOLERANCE[dtype]


@EXAMPLES
@given(
    contexts=st.lists(st.integers(1, 140), min_size=1, max_size=4),
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
    rows=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 90)), min_size=1, max_size=3),
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
    contexts = [200, 3, 64, 130]
    together = Paged(shape, [1] * 4, contexts, 16, torch.float32)
    alone = decode(together)
    for row, context in enumerate(contexts):
        one = Paged(shape, [1], [context], 16, torch.float32)
        one.layer, one.q = together.layer, together.q[row : row + 1]
        one.block_tables = together.block_tables[row : row + 1]
        # A launch captured for longer sequences has more splits, which leave at once.
        for splits in (max_splits(context, 0, DECODE.chunk), 9):
            assert torch.equal(decode(one, splits=splits)[0], alone[row])


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
