"""Paged decode attention: one new query per sequence, over its blocks in the pool.

    grid (sequence, K/V head, split)      a program: the query heads of one K/V head, over one chunk of the context

    context   |-- chunk 0 --|-- chunk 1 --|-- chunk 2 ·|      chunks have a fixed length, whatever else is in the batch
    tiles      ▇▇▇▇▇▇▇▇▇▇▇▇▇ ▇▇▇▇▇▇▇▇▇▇▇▇▇ ▇▇▇▇▇▇▒            ▒: the only tile that needs a mask

Split-KV as in Flash-Decoding (Dao et al. 2023), but by a fixed chunk length and not by a number of splits, so that a
sequence's result never depends on its neighbours. A sequence of one chunk writes its output at once; of several, each
program leaves a partial result with its log-sum-exp, and a second kernel joins them. The query heads that share a K/V
head are rows of one tile (GQA packing), so K and V are read once for all of them; where nothing is shared (MHA)
products are taken element by element.

The grid covers as many splits as the longest sequence that the launch may see; programs beyond a sequence's end leave
at once, so that a captured launch serves all lengths up to that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

import triton
import triton.language as tl

from ..backend import AttentionSpec
from .tile import attend_range

_MIN_DOT_ROWS = 16
"""Rows that a matrix unit multiplies at least."""
_JOINED_SPLITS = 16
"""Partial results that the second kernel joins at a time."""


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """What a sweep has found for a shape (tuning.py)."""

    chunk: int = 512
    """Tokens per split, a multiple of `tile`. Part of the arithmetic: another value rounds differently."""
    tile: int = 64
    """Tokens per step of the inner loop: a power of two, 16 or more."""
    num_warps: int = 4
    num_stages: int = 3
    """Below 3, loads through a block table are not pipelined."""


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Partial results of a launch of at most `num_rows` sequences of `max_splits` chunks."""

    partial: torch.Tensor  # fp32, at least [num_rows, num_heads, max_splits, head_dim]
    lse: torch.Tensor  # fp32, at least [num_rows, num_heads, max_splits], log2 of each part's sum of exponentials
    max_splits: int

    @classmethod
    def allocate(cls, num_rows: int, max_splits: int, spec: AttentionSpec, device: torch.device) -> DecodeWorkspace:
        # A single split is never written here.
        rows = num_rows if max_splits > 1 else 0
        shape = (rows, spec.num_heads, max_splits)
        return cls(
            torch.empty((*shape, spec.head_dim), dtype=torch.float32, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
            max_splits,
        )

    def shaped(self, max_splits: int) -> DecodeWorkspace:
        """The same memory for launches of no more rows and fewer splits."""
        return replace(self, max_splits=max_splits)


def max_splits(max_kv_len: int, window: int, chunk: int) -> int:
    """Chunks that the longest sequence touches. A window of w tokens can lie across ceil((w - 1) / chunk) + 1."""
    full = -(-max_kv_len // chunk)
    return min(full, -(-(window - 1) // chunk) + 1) if window > 0 else full


@triton.jit
def decode_kernel(q_ptr, layer_ptr, tables_ptr, kv_lens_ptr, out_ptr, partial_ptr, lse_ptr, q_stride, table_stride,
                  block_stride, v_offset, scale, max_splits, GROUP: tl.constexpr, ROWS: tl.constexpr,
                  WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
                  BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """One chunk of one sequence for the GROUP query heads of one K/V head, padded to ROWS."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_heads = tl.num_programs(1) * GROUP
    kv_len = tl.load(kv_lens_ptr + row).to(tl.int32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(kv_len - WINDOW, 0)
    # Chunks stand at multiples of their length in the sequence, also where a window hides the first ones.
    chunk_start = (first // CHUNK + split) * CHUNK
    if chunk_start >= kv_len:
        return
    end = tl.minimum(chunk_start + CHUNK, kv_len)
    heads = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PAD)
    real = (heads[:, None] < GROUP) & (dims[None, :] < HEAD_DIM)
    head_offsets = (kv_head * GROUP + heads[:, None]) * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + row * q_stride + head_offsets, mask=real, other=0.0)  # [M, D]
    positions = tl.zeros([ROWS], tl.int32) + (kv_len - 1)
    table_ptr = tables_ptr + row * table_stride
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PAD], tl.float32)

    # Only the tiles that the window's beginning and the sequence's end cut need a mask.
    start = chunk_start
    if WINDOW > 0:
        first_tile = tl.maximum(first // TILE * TILE, chunk_start)
        start = tl.minimum(tl.maximum(tl.cdiv(first, TILE) * TILE, chunk_start), end)
        maximum, total, acc = attend_range(
            q, positions, maximum, total, acc, layer_ptr, table_ptr, first_tile, start, first, end, kv_head,
            block_stride, v_offset, scale, True, WINDOW, SOFT_CAP, ROWS, TILE, BLOCK_SIZE, HEAD_DIM, DIM_PAD,
            PRECISION)  # fmt: skip
    stop = tl.maximum(end // TILE * TILE, start)
    maximum, total, acc = attend_range(
        q, positions, maximum, total, acc, layer_ptr, table_ptr, start, stop, first, end, kv_head, block_stride,
        v_offset, scale, False, WINDOW, SOFT_CAP, ROWS, TILE, BLOCK_SIZE, HEAD_DIM, DIM_PAD, PRECISION)  # fmt: skip
    maximum, total, acc = attend_range(
        q, positions, maximum, total, acc, layer_ptr, table_ptr, stop, end, first, end, kv_head, block_stride,
        v_offset, scale, True, WINDOW, SOFT_CAP, ROWS, TILE, BLOCK_SIZE, HEAD_DIM, DIM_PAD, PRECISION)  # fmt: skip

    result = acc / total[:, None]
    num_splits = tl.cdiv(kv_len, CHUNK) - first // CHUNK
    if num_splits == 1:
        tl.store(out_ptr + row * (num_heads * HEAD_DIM) + head_offsets, result.to(out_ptr.dtype.element_ty), mask=real)
    else:
        parts = (row * num_heads + kv_head * GROUP + heads) * max_splits + split  # int64 [M]
        tl.store(partial_ptr + parts[:, None] * HEAD_DIM + dims[None, :], result, mask=real)
        tl.store(lse_ptr + parts, maximum + tl.log2(total), mask=heads < GROUP)


@triton.jit
def join_kernel(partial_ptr, lse_ptr, kv_lens_ptr, out_ptr, max_splits, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
                SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr):  # fmt: skip
    """The parts of one query head of one sequence, SPLITS at a time, into its output."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    kv_len = tl.load(kv_lens_ptr + row).to(tl.int32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(kv_len - WINDOW, 0)
    num_splits = tl.cdiv(kv_len, CHUNK) - first // CHUNK
    if num_splits <= 1:
        return  # written already, or a padded row without a sequence
    dims = tl.arange(0, DIM_PAD)
    place = row * tl.num_programs(1) + head
    maximum = float("-inf")
    total = 0.0
    acc = tl.zeros([DIM_PAD], tl.float32)
    for start in range(0, num_splits, SPLITS):
        splits = start + tl.arange(0, SPLITS)
        real = splits < num_splits
        parts = place * max_splits + splits
        lse = tl.load(lse_ptr + parts, mask=real, other=float("-inf"))  # [S]
        part_ptrs = partial_ptr + parts[:, None] * HEAD_DIM + dims[None, :]
        values = tl.load(part_ptrs, mask=real[:, None] & (dims[None, :] < HEAD_DIM), other=0.0)  # [S, D]
        new_maximum = tl.maximum(maximum, tl.max(lse, axis=0))
        rescale = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(lse - new_maximum)
        total = total * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * values, axis=0)
        maximum = new_maximum
    out_ptrs = out_ptr + place * HEAD_DIM + dims
    tl.store(out_ptrs, (acc / total).to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def paged_decode(
    q: torch.Tensor,
    layer: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    out: torch.Tensor,
    workspace: DecodeWorkspace,
    spec: AttentionSpec,
    config: DecodeConfig,
) -> None:
    """Attention of one query per row, into `out`.

    q [num_rows, num_heads, head_dim], its heads contiguous; layer [num_blocks, 2, num_kv_heads, block_size, head_dim],
    contiguous within a block; block_tables int32 [num_rows, max_blocks]; kv_lens int32 [num_rows], 0 for a row to be
    left alone; out [num_rows, num_heads * head_dim], contiguous.
    """
    num_rows = q.shape[0]
    constants = attention_constants(spec, layer.shape[3], q.dtype)
    decode_kernel[(num_rows, spec.num_kv_heads, workspace.max_splits)](
        q, layer, block_tables, kv_lens, out, workspace.partial, workspace.lse, q.stride(0), block_tables.stride(0),
        layer.stride(0), layer.stride(1), spec.scale, workspace.max_splits, ROWS=decode_rows(spec), CHUNK=config.chunk,
        TILE=config.tile, num_warps=config.num_warps, num_stages=config.num_stages, **constants)  # fmt: skip
    if workspace.max_splits > 1:
        join_kernel[(num_rows, spec.num_heads)](
            workspace.partial, workspace.lse, kv_lens, out, workspace.max_splits, WINDOW=spec.window,
            CHUNK=config.chunk, SPLITS=_JOINED_SPLITS, HEAD_DIM=spec.head_dim, DIM_PAD=constants["DIM_PAD"],
            num_warps=4)  # fmt: skip


def decode_rows(spec: AttentionSpec) -> int:
    """Rows of a program's query tile: one without sharing, else as many as a matrix unit needs."""
    group = spec.num_heads // spec.num_kv_heads
    return 1 if group == 1 else max(_MIN_DOT_ROWS, int(triton.next_power_of_2(group)))


def attention_constants(spec: AttentionSpec, block_size: int, dtype: torch.dtype) -> dict[str, object]:
    """Compile-time arguments of decode and prefill that follow from the model."""
    return {
        "GROUP": spec.num_heads // spec.num_kv_heads,
        "WINDOW": spec.window,
        "SOFT_CAP": spec.soft_cap,
        "BLOCK_SIZE": block_size,
        "HEAD_DIM": spec.head_dim,
        "DIM_PAD": triton.next_power_of_2(spec.head_dim),
        # fp32 products stay fp32: tf32 would cost three digits.
        "PRECISION": "ieee" if dtype is torch.float32 else "tf32",
    }
