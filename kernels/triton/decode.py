"""Paged decode attention: one new query per sequence, over its blocks in the pool.

    unit (chunk of a sequence, K/V head)  the query heads of that K/V head, over one chunk of the context

    context   |-- chunk 0 --|-- chunk 1 --|-- chunk 2 ·|      chunks have a fixed length, whatever else is in the batch
    tiles      ▇▇▇▇▇▇▇▇▇▇▇▇▇ ▇▇▇▇▇▇▇▇▇▇▇▇▇ ▇▇▇▇▇▇▒            ▒: the only tile that needs a mask

Split-KV as in Flash-Decoding (Dao et al. 2023), but by a fixed chunk length and not by a number of splits, so that a
sequence's result never depends on its neighbours. A sequence of one chunk writes its output at once; of several, each
program leaves a partial result with its log-sum-exp, and a second kernel joins them. The query heads that share a K/V
head are rows of one tile (GQA packing), so K and V are read once for all of them; where nothing is shared (MHA)
products are taken element by element.

Which chunks there are is listed on the device, once per step for all layers (`list_chunks`), and programs walk through
the units of that list in turn. A captured launch thus serves all lengths up to the longest that it was planned for, and
one long sequence costs short neighbours nothing: a grid over (sequence, head, chunk) would start a program for every
chunk that the longest one has, for each of them. With one of 32k tokens among 256 and 8 K/V heads that is 131072
programs for 2552 units; at about 1 µs for a program that finds nothing to do, and four at a time on each of 132
multiprocessors, a quarter of a millisecond per layer. Here it is at most `_MAX_PROGRAMS` of them, hence below 4 µs.
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
_MAX_PROGRAMS = 2048
"""Three or four for each that a large card runs at once, so that early ones that got more to do end no later."""
_LISTED_ROWS = 256
_LISTED_CHUNKS = 64
"""Of `list_kernel`, at a time."""


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
    """The chunks of a step of at most `num_rows` sequences of `max_splits` chunks, and partial results of a launch."""

    chunks: torch.Tensor  # int64 [num_rows * max_splits], row << 32 | split; rows in order, and their splits
    chunk_starts: torch.Tensor  # int32 [num_rows + 1], where each row's chunks begin, and how many there are
    partial: torch.Tensor  # fp32 [num_rows * max_splits, num_heads, head_dim]
    lse: torch.Tensor  # fp32 [num_rows * max_splits, num_heads], log2 of each part's sum of exponentials
    max_splits: int

    @classmethod
    def allocate(cls, num_rows: int, max_splits: int, spec: AttentionSpec, device: torch.device) -> DecodeWorkspace:
        # A single split is never written as a part.
        parts = num_rows * max_splits if max_splits > 1 else 0
        return cls(
            torch.empty(num_rows * max_splits, dtype=torch.int64, device=device),
            torch.empty(num_rows + 1, dtype=torch.int32, device=device),
            torch.empty((parts, spec.num_heads, spec.head_dim), dtype=torch.float32, device=device),
            torch.empty((parts, spec.num_heads), dtype=torch.float32, device=device),
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
def _first_key(kv_len, WINDOW: tl.constexpr):
    """The first position that the newest query sees."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(kv_len - WINDOW, 0)
    return first


@triton.jit(do_not_specialize_on_alignment=["kv_lens_ptr"])
def list_kernel(kv_lens_ptr, chunks_ptr, starts_ptr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
                CHUNKS: tl.constexpr):  # fmt: skip
    """The chunks of one row, behind those of the rows before it; ROWS lengths are read and CHUNKS written at a time."""
    row = tl.program_id(0)
    before = tl.zeros([ROWS], tl.int32)
    for first_row in range(0, row, ROWS):
        rows = first_row + tl.arange(0, ROWS)
        lens = tl.load(kv_lens_ptr + rows, mask=rows < row, other=0).to(tl.int32)
        before += tl.cdiv(lens, CHUNK) - _first_key(lens, WINDOW) // CHUNK
    start = tl.sum(before, axis=0)
    kv_len = tl.load(kv_lens_ptr + row).to(tl.int32)
    count = tl.cdiv(kv_len, CHUNK) - _first_key(kv_len, WINDOW) // CHUNK
    for first_split in range(0, count, CHUNKS):
        splits = first_split + tl.arange(0, CHUNKS)
        tl.store(chunks_ptr + start + splits, (row.to(tl.int64) << 32) | splits, mask=splits < count)
    tl.store(starts_ptr + row, start)
    if row == tl.num_programs(0) - 1:
        tl.store(starts_ptr + row + 1, start + count)


# What differs from batch to batch must not be compiled anew for being 1 or a multiple of 16.
@triton.jit(do_not_specialize=["table_stride", "num_rows"], do_not_specialize_on_alignment=["kv_lens_ptr"])
def decode_kernel(q_ptr, layer_ptr, tables_ptr, kv_lens_ptr, chunks_ptr, starts_ptr, out_ptr, partial_ptr, lse_ptr,
                  num_rows, q_stride, table_stride, block_stride, v_offset, scale, NUM_KV_HEADS: tl.constexpr,
                  GROUP: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
                  CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
                  DIM_PAD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Every so many units, each one chunk of one sequence for the GROUP query heads of one K/V head, padded to ROWS."""
    # K/V heads of a chunk lie side by side in the pool, and are read by programs that run at the same time.
    num_units = tl.load(starts_ptr + num_rows) * NUM_KV_HEADS
    # What the units share is computed anew for each: carried along, it would take registers of the loops within.
    for unit in tl.range(tl.program_id(0), num_units, tl.num_programs(0), disable_licm=True):
        chunk = tl.load(chunks_ptr + unit // NUM_KV_HEADS)
        _decode_unit(
            q_ptr, layer_ptr, tables_ptr, kv_lens_ptr, out_ptr, partial_ptr, lse_ptr, unit, chunk >> 32,
            (chunk & 0x7FFFFFFF).to(tl.int32), q_stride, table_stride, block_stride, v_offset, scale, NUM_KV_HEADS,
            GROUP, ROWS, WINDOW, SOFT_CAP, CHUNK, TILE, BLOCK_SIZE, HEAD_DIM, DIM_PAD, PRECISION)  # fmt: skip


@triton.jit
def _decode_unit(q_ptr, layer_ptr, tables_ptr, kv_lens_ptr, out_ptr, partial_ptr, lse_ptr, unit, row, split, q_stride,
                 table_stride, block_stride, v_offset, scale, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
                 ROWS: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, CHUNK: tl.constexpr,
                 TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_PAD: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """One unit: `row` int64, `split` counts the chunks of the row that are not wholly outside its window."""
    kv_head = unit % NUM_KV_HEADS
    kv_len = tl.load(kv_lens_ptr + row).to(tl.int32)
    first = _first_key(kv_len, WINDOW)
    # Chunks stand at multiples of their length in the sequence, also where a window hides the first ones.
    chunk_start = (first // CHUNK + split) * CHUNK
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
        out_ptrs = out_ptr + row * (NUM_KV_HEADS * GROUP * HEAD_DIM) + head_offsets
        tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=real)
    else:
        parts = tl.cast(unit, tl.int64) * GROUP + heads  # [M], as units are in the order (chunk, K/V head)
        tl.store(partial_ptr + parts[:, None] * HEAD_DIM + dims[None, :], result, mask=real)
        tl.store(lse_ptr + parts, maximum + tl.log2(total), mask=heads < GROUP)


@triton.jit
def join_kernel(partial_ptr, lse_ptr, starts_ptr, out_ptr, SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr,
                DIM_PAD: tl.constexpr):  # fmt: skip
    """The parts of one query head of one sequence, SPLITS at a time, into its output."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    start = tl.load(starts_ptr + row)
    num_splits = tl.load(starts_ptr + row + 1) - start
    if num_splits <= 1:
        return  # written already, or a padded row without a sequence
    dims = tl.arange(0, DIM_PAD)
    maximum = float("-inf")
    total = 0.0
    acc = tl.zeros([DIM_PAD], tl.float32)
    for first_split in range(0, num_splits, SPLITS):
        splits = first_split + tl.arange(0, SPLITS)
        real = splits < num_splits
        parts = (start + splits).to(tl.int64) * num_heads + head
        lse = tl.load(lse_ptr + parts, mask=real, other=float("-inf"))  # [S]
        part_ptrs = partial_ptr + parts[:, None] * HEAD_DIM + dims[None, :]
        values = tl.load(part_ptrs, mask=real[:, None] & (dims[None, :] < HEAD_DIM), other=0.0)  # [S, D]
        new_maximum = tl.maximum(maximum, tl.max(lse, axis=0))
        rescale = tl.exp2(maximum - new_maximum)
        weights = tl.exp2(lse - new_maximum)
        total = total * rescale + tl.sum(weights, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * values, axis=0)
        maximum = new_maximum
    out_ptrs = out_ptr + (row * num_heads + head) * HEAD_DIM + dims
    tl.store(out_ptrs, (acc / total).to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def list_chunks(kv_lens: torch.Tensor, workspace: DecodeWorkspace, spec: AttentionSpec, config: DecodeConfig) -> None:
    """Write down the chunks of rows of these lengths, integers [num_rows], for launches of `paged_decode`."""
    list_kernel[(kv_lens.shape[0],)](
        kv_lens, workspace.chunks, workspace.chunk_starts, WINDOW=spec.window, CHUNK=config.chunk, ROWS=_LISTED_ROWS,
        CHUNKS=_LISTED_CHUNKS, num_warps=1)  # fmt: skip


def paged_decode(
    q: torch.Tensor,
    layer: torch.Tensor,
    block_tables: torch.Tensor,
    kv_lens: torch.Tensor,
    out: torch.Tensor,
    workspace: DecodeWorkspace,
    spec: AttentionSpec,
    config: DecodeConfig,
    *,
    listed: bool = False,
) -> None:
    """Attention of one query per row, into `out`.

    q [num_rows, num_heads, head_dim], its heads contiguous; layer [num_blocks, 2, num_kv_heads, block_size, head_dim],
    contiguous within a block; block_tables int32 [num_rows, max_blocks]; kv_lens int32 [num_rows], 0 for a row to be
    left alone; out [num_rows, num_heads * head_dim], contiguous. `listed`: `list_chunks` has seen these lengths; a
    layer alone may leave it to this call.
    """
    if not listed:
        list_chunks(kv_lens, workspace, spec, config)
    num_rows = q.shape[0]
    constants = attention_constants(spec, layer.shape[3], q.dtype)
    max_units = num_rows * workspace.max_splits * spec.num_kv_heads
    decode_kernel[(min(max_units, _MAX_PROGRAMS),)](
        q, layer, block_tables, kv_lens, workspace.chunks, workspace.chunk_starts, out, workspace.partial,
        workspace.lse, num_rows, q.stride(0), block_tables.stride(0), layer.stride(0), layer.stride(1), spec.scale,
        NUM_KV_HEADS=spec.num_kv_heads, ROWS=decode_rows(spec), CHUNK=config.chunk, TILE=config.tile,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=_max_registers(spec, q.dtype, config),
        **constants)  # fmt: skip
    if workspace.max_splits > 1:
        join_kernel[(num_rows, spec.num_heads)](
            workspace.partial, workspace.lse, workspace.chunk_starts, out, SPLITS=_JOINED_SPLITS,
            HEAD_DIM=spec.head_dim, DIM_PAD=constants["DIM_PAD"], num_warps=4)  # fmt: skip


def decode_rows(spec: AttentionSpec) -> int:
    """Rows of a program's query tile: one without sharing, else as many as a matrix unit needs."""
    group = spec.num_heads // spec.num_kv_heads
    return 1 if group == 1 else max(_MIN_DOT_ROWS, int(triton.next_power_of_2(group)))


def _max_registers(spec: AttentionSpec, dtype: torch.dtype, config: DecodeConfig) -> int | None:
    """Of a thread, as compiles show it (bench/aot.py): so that three programs of 128 threads with large heads, and four
    without sharing, run on a multiprocessor at once. Left alone, the assembler takes a few too many in the one case,
    and spills to save more in the other; where it does well by itself, a limit makes it spill."""
    if dtype is torch.float32 or config.num_warps != 4:
        return None
    if spec.head_dim > 128:
        return 168
    return 128 if spec.num_heads == spec.num_kv_heads else None


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
