"""Rotary embedding fused with the write of keys and values into the pool, and with the norm of q and k that some models
have: q, k and v of a token are read once, and nothing is written twice."""

from __future__ import annotations

import torch

import triton
import triton.language as tl

from ..backend import AttentionSpec

_HEADS_PER_PROGRAM = 8


# Positions and slots may be parts of larger tensors: wherever they begin, the kernel is the same.
@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def rope_write_kernel(qkv_ptr, table_ptr, positions_ptr, slots_ptr, layer_ptr, q_norm_ptr, k_norm_ptr, eps, qkv_stride,
                      block_stride, v_offset, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
                      BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
                      DIM_PAD: tl.constexpr, HALF_PAD: tl.constexpr, HEADS: tl.constexpr,
                      NORM: tl.constexpr):  # fmt: skip
    """HEADS of the q, k and v heads of one token: q is rotated where it lies, k and v go to the token's slot.

    A negative slot belongs to no sequence (padding of a captured launch): nothing is written for it.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)  # [H]: q heads, then k heads, then v heads
    is_query = heads < NUM_HEADS
    is_value = heads >= NUM_HEADS + NUM_KV_HEADS
    exists = heads < tl.where(slot >= 0, NUM_HEADS + 2 * NUM_KV_HEADS, 0)
    kv_head = tl.where(is_value, heads - NUM_HEADS - NUM_KV_HEADS, heads - NUM_HEADS)
    source = qkv_ptr + token * qkv_stride + heads * HEAD_DIM  # [H]
    within = kv_head * (BLOCK_SIZE * HEAD_DIM) + (slot % BLOCK_SIZE) * HEAD_DIM
    kept = layer_ptr + (slot // BLOCK_SIZE) * block_stride + within + tl.where(is_value, v_offset, 0)
    target = tl.where(is_query, source, kept)  # [H]

    HALF: tl.constexpr = ROTARY_DIM // 2
    halves = tl.arange(0, HALF_PAD)
    pair = exists[:, None] & (halves[None, :] < HALF)
    low = tl.load(source[:, None] + halves[None, :], mask=pair, other=0.0).to(tl.float32)  # [H, HALF]
    high = tl.load(source[:, None] + HALF + halves[None, :], mask=pair, other=0.0).to(tl.float32)
    if NORM:
        dims = tl.arange(0, DIM_PAD)
        whole = exists[:, None] & (dims[None, :] < HEAD_DIM)
        x = tl.load(source[:, None] + dims[None, :], mask=whole, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)  # [H]
        inverse = tl.where(is_value, 1.0, inverse)
        norm_ptrs = tl.where(is_query, q_norm_ptr, k_norm_ptr)  # [H]
        scaled = pair & (heads < NUM_HEADS + NUM_KV_HEADS)[:, None]
        low = low * inverse[:, None] * tl.load(norm_ptrs[:, None] + halves[None, :], mask=scaled, other=1.0)
        high = high * inverse[:, None] * tl.load(norm_ptrs[:, None] + HALF + halves[None, :], mask=scaled, other=1.0)
    angle = table_ptr + position * ROTARY_DIM + halves  # [HALF]
    cosine = tl.load(angle, mask=halves < HALF, other=1.0)[None, :]
    sine = tl.load(angle + HALF, mask=halves < HALF, other=0.0)[None, :]
    cosine = tl.where(is_value[:, None], 1.0, cosine)
    sine = tl.where(is_value[:, None], 0.0, sine)
    element = layer_ptr.dtype.element_ty
    tl.store(target[:, None] + halves[None, :], (low * cosine - high * sine).to(element), mask=pair)
    tl.store(target[:, None] + HALF + halves[None, :], (high * cosine + low * sine).to(element), mask=pair)
    if ROTARY_DIM < HEAD_DIM:
        REST_PAD: tl.constexpr = DIM_PAD
        rest = ROTARY_DIM + tl.arange(0, REST_PAD)
        tail = exists[:, None] & (rest[None, :] < HEAD_DIM)
        x_rest = tl.load(source[:, None] + rest[None, :], mask=tail, other=0.0).to(tl.float32)
        if NORM:
            weight = tl.load(
                norm_ptrs[:, None] + rest[None, :], mask=tail & (heads < NUM_HEADS + NUM_KV_HEADS)[:, None], other=1.0
            )
            x_rest = x_rest * inverse[:, None] * weight
        tl.store(target[:, None] + rest[None, :], x_rest.to(element), mask=tail)


def rope_write(
    qkv: torch.Tensor,
    rope_table: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    layer: torch.Tensor,
    spec: AttentionSpec,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """Rotate q and k, write k and v to their slots; returns q [num_tokens, num_heads, head_dim], a view of `qkv`.

    qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; rope_table fp32 [max_positions, rotary_dim], cosines
    then sines; positions and slots integers [num_tokens], a negative slot for tokens to be left alone; layer
    [num_blocks, 2, num_kv_heads, block_size, head_dim]. `norms`: q's and k's RMSNorm weights [head_dim], and epsilon.
    """
    num_heads = spec.num_heads + 2 * spec.num_kv_heads
    q_norm, k_norm, eps = norms if norms is not None else (qkv, qkv, 0.0)
    rotary_dim = rope_table.shape[1]
    rope_write_kernel[(qkv.shape[0], triton.cdiv(num_heads, _HEADS_PER_PROGRAM))](
        qkv, rope_table, positions, slots, layer, q_norm, k_norm, eps, qkv.stride(0), layer.stride(0), layer.stride(1),
        NUM_HEADS=spec.num_heads, NUM_KV_HEADS=spec.num_kv_heads, BLOCK_SIZE=layer.shape[3], HEAD_DIM=spec.head_dim,
        ROTARY_DIM=rotary_dim, DIM_PAD=triton.next_power_of_2(spec.head_dim),
        HALF_PAD=triton.next_power_of_2(rotary_dim // 2), HEADS=_HEADS_PER_PROGRAM, NORM=norms is not None,
        num_warps=4)  # fmt: skip
    return qkv.view(qkv.shape[0], num_heads, spec.head_dim)[:, : spec.num_heads]
