"""What decode and prefill share: keys and values of a range of positions into the running softmax of some query rows.

Online softmax (Milakov and Gimelshein 2018) as in FlashAttention-2 (Dao 2023), with scores in units of log2 so that the
exponential is one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _soft_capped(scores, cap: tl.constexpr):
    """cap * tanh(scores / cap); finite at either end."""
    return cap * (2.0 / (1.0 + tl.exp2(scores * (-2.0 * _LOG2_E / cap))) - 1.0)


@triton.jit
def _products(q, k, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """q [M, D], k [N, D] → [M, N] in fp32. One row alone is not worth a matrix unit's 16."""
    if ROWS == 1:
        return tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1)[None, :]
    return tl.dot(q, tl.trans(k), input_precision=PRECISION)


@triton.jit
def _weighted_sum(weights, v, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """weights fp32 [M, N], v [N, D] → [M, D] in fp32."""
    if ROWS == 1:
        return tl.sum(tl.trans(weights) * v.to(tl.float32), axis=0)[None, :]
    return tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)


@triton.jit
def attend_range(q, query_positions, maximum, total, acc, layer_ptr, table_ptr, start, stop, first, end, kv_head,
                 block_stride, v_offset, scale, MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr,
                 ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
                 DIM_PAD: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Tiles from `start` until `stop` for query rows [M]; returns the new (maximum, total, acc).

    q [M, DIM_PAD], query_positions int32 [M]; maximum, total fp32 [M]; acc fp32 [M, DIM_PAD]. Of the pool only
    positions in [first, end) are read: others may hold another sequence's values, or NaN, which would survive a
    weight of 0. Without MASKED, every position of every tile must be readable and visible to every row.
    """
    dims = tl.arange(0, DIM_PAD)
    for tile_start in range(start, stop, TILE):
        positions = tile_start + tl.arange(0, TILE)  # [N]
        readable = (positions >= first) & (positions < end)
        if MASKED:
            blocks = tl.load(table_ptr + positions // BLOCK_SIZE, mask=readable, other=0)
        else:
            blocks = tl.load(table_ptr + positions // BLOCK_SIZE)
        # int64: pools outgrow 2**31 elements.
        offsets = blocks.to(tl.int64) * block_stride + (kv_head * BLOCK_SIZE + positions % BLOCK_SIZE) * HEAD_DIM
        k_ptrs = layer_ptr + offsets[:, None] + dims[None, :]  # [N, D]
        if MASKED:
            mask = readable[:, None] & (dims[None, :] < HEAD_DIM)
            k = tl.load(k_ptrs, mask=mask, other=0.0)
            v = tl.load(k_ptrs + v_offset, mask=mask, other=0.0)
        elif HEAD_DIM != DIM_PAD:
            k = tl.load(k_ptrs, mask=dims[None, :] < HEAD_DIM, other=0.0)
            v = tl.load(k_ptrs + v_offset, mask=dims[None, :] < HEAD_DIM, other=0.0)
        else:
            k = tl.load(k_ptrs)
            v = tl.load(k_ptrs + v_offset)
        if SOFT_CAP > 0.0:
            scores = _soft_capped(_products(q, k, ROWS, PRECISION) * scale, SOFT_CAP) * _LOG2_E
        else:
            scores = _products(q, k, ROWS, PRECISION) * (scale * _LOG2_E)  # [M, N]
        if MASKED:
            visible = readable[None, :] & (positions[None, :] <= query_positions[:, None])
            if WINDOW > 0:
                visible = visible & (positions[None, :] > query_positions[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        if MASKED:
            # A row that has seen nothing yet has a maximum of -inf, and -inf minus itself is NaN.
            reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        else:
            reference = new_maximum
        rescale = tl.exp2(maximum - reference)
        weights = tl.exp2(scores - reference[:, None])
        total = total * rescale + tl.sum(weights, axis=1)
        acc = acc * rescale[:, None] + _weighted_sum(weights, v, ROWS, PRECISION)
        maximum = new_maximum
    return maximum, total, acc
