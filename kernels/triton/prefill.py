"""Paged prefill attention: chunks of prompts over their own keys and whatever lies before them in the pool.

    tile of queries      one program per (tile, K/V head); its rows are (query, head of the group) pairs, so that a K/V
    row  query  head     tile is read once for all heads that share it, and a short chunk still fills a matrix unit
     0     0     0
     1     0     1       keys of one program, for queries at positions [p, p + Q):
     2     1     0
     3     1     1       | masked (window begins) |  plain: visible to all rows  | masked: the causal diagonal |

All rows of a step go in one launch, whatever their lengths: a list of (row, first query) names the tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

import triton
import triton.language as tl

from ..backend import AttentionSpec
from .decode import attention_constants
from .tile import attend_range


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """What a sweep has found for a shape (tuning.py)."""

    rows: int = 128
    """(query, head) pairs of a program: a power of two, at least 16 and the heads that share a K/V head."""
    tile: int = 64
    """Keys per step of the inner loop: a power of two, 16 or more."""
    num_warps: int = 8
    num_stages: int = 3
    """Below 3, loads through a block table are not pipelined."""


# What differs from batch to batch must not be compiled anew for being 1 or a multiple of 16; the small tensors may be
# parts of larger ones, and are read number by number.
@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["kv_lens_ptr", "query_starts_ptr", "tile_rows_ptr", "tile_firsts_ptr"],
)
def prefill_kernel(q_ptr, layer_ptr, tables_ptr, kv_lens_ptr, query_starts_ptr, tile_rows_ptr, tile_firsts_ptr, out_ptr,
                   q_stride, table_stride, block_stride, v_offset, scale, GROUP: tl.constexpr, ROWS: tl.constexpr,
                   WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                   HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """ROWS // GROUP queries of one sequence, for the GROUP query heads of one K/V head."""
    # The last tiles of a prompt see the most keys: they start first, so that no long one is left for the end.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    kv_head = tl.program_id(0)
    num_heads = tl.num_programs(0) * GROUP
    row = tl.load(tile_rows_ptr + tile).to(tl.int64)
    if row < 0:
        return  # padding of a captured launch
    first_query = tl.load(tile_firsts_ptr + tile)
    token_start = tl.load(query_starts_ptr + row).to(tl.int32)
    num_queries = tl.load(query_starts_ptr + row + 1).to(tl.int32) - token_start
    kv_len = tl.load(kv_lens_ptr + row).to(tl.int32)
    num_before = kv_len - num_queries

    pairs = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PAD)
    queries = first_query + pairs // GROUP  # [M]
    inside = (pairs < ROWS // GROUP * GROUP) & (queries < num_queries)
    real = inside[:, None] & (dims[None, :] < HEAD_DIM)
    tokens = (token_start + queries).to(tl.int64)
    head_offsets = ((kv_head * GROUP + pairs % GROUP) * HEAD_DIM)[:, None] + dims[None, :]
    q = tl.load(q_ptr + tokens[:, None] * q_stride + head_offsets, mask=real, other=0.0)  # [M, D]
    last_query = tl.minimum(first_query + ROWS // GROUP, num_queries) - 1
    # Idle rows take the last query's place, so that they neither see anything new nor divide by zero.
    positions = num_before + tl.minimum(queries, last_query)  # [M]
    first_position = num_before + first_query
    end = num_before + last_query + 1
    table_ptr = tables_ptr + row * table_stride
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)

    first = 0
    start = 0
    if WINDOW > 0:
        # Keys that the first query sees begin at `first`; those that all queries see, from `all_see` on.
        first = tl.maximum(first_position - WINDOW + 1, 0)
        all_see = tl.maximum(end - WINDOW, 0)
        start = tl.minimum(tl.cdiv(all_see, TILE) * TILE, end)
        maximum, total, acc = attend_range(
            q, positions, maximum, total, acc, layer_ptr, table_ptr, first // TILE * TILE, start, first, end, kv_head,
            block_stride, v_offset, scale, True, WINDOW, SOFT_CAP, ROWS, TILE, BLOCK_SIZE, HEAD_DIM, DIM_PAD,
            PRECISION)  # fmt: skip
    stop = tl.maximum((first_position + 1) // TILE * TILE, start)
    maximum, total, acc = attend_range(
        q, positions, maximum, total, acc, layer_ptr, table_ptr, start, stop, first, end, kv_head, block_stride,
        v_offset, scale, False, WINDOW, SOFT_CAP, ROWS, TILE, BLOCK_SIZE, HEAD_DIM, DIM_PAD, PRECISION)  # fmt: skip
    maximum, total, acc = attend_range(
        q, positions, maximum, total, acc, layer_ptr, table_ptr, stop, end, first, end, kv_head, block_stride,
        v_offset, scale, True, WINDOW, SOFT_CAP, ROWS, TILE, BLOCK_SIZE, HEAD_DIM, DIM_PAD, PRECISION)  # fmt: skip

    out_ptrs = out_ptr + tokens[:, None] * (num_heads * HEAD_DIM) + head_offsets
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=real)


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """Which queries each program of a launch computes."""

    rows: npt.NDArray[np.int32]  # [num_tiles], row of the batch
    firsts: npt.NDArray[np.int32]  # [num_tiles], its first query


def prefill_tiles(
    query_lens: Sequence[int], first_row: int, spec: AttentionSpec, config: PrefillConfig
) -> PrefillTiles:
    """Tiles of rows [first_row, len(query_lens)), in order."""
    per_tile = config.rows // (spec.num_heads // spec.num_kv_heads)
    lens = np.asarray(query_lens[first_row:], np.int64)
    counts = -(-lens // per_tile)  # [num_rows]
    rows = np.repeat(np.arange(len(lens)), counts)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    return PrefillTiles((rows + first_row).astype(np.int32), (within * per_tile).astype(np.int32))


def paged_prefill(
    q: torch.Tensor,
    layer: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    query_starts: torch.Tensor,
    tile_rows: torch.Tensor,
    tile_firsts: torch.Tensor,
    out: torch.Tensor,
    spec: AttentionSpec,
    config: PrefillConfig,
) -> None:
    """Attention of the queries that the tiles name, into `out`; other tokens' outputs are left alone.

    q [num_tokens, num_heads, head_dim], its heads contiguous; layer [num_blocks, 2, num_kv_heads, block_size,
    head_dim], contiguous within a block; block_tables int32 [num_rows, max_blocks]; kv_lens int32 [num_rows];
    query_starts int32 [num_rows + 1]; tile_rows, tile_firsts int32 [num_tiles], as `prefill_tiles` makes them (a row of
    -1 is skipped); out [num_tokens, num_heads * head_dim], contiguous.
    """
    prefill_kernel[(spec.num_kv_heads, tile_rows.shape[0])](
        q, layer, block_tables, kv_lens, query_starts, tile_rows, tile_firsts, out, q.stride(0), block_tables.stride(0),
        layer.stride(0), layer.stride(1), spec.scale, ROWS=config.rows, TILE=config.tile, num_warps=config.num_warps,
        num_stages=config.num_stages, **attention_constants(spec, layer.shape[3], q.dtype))  # fmt: skip
