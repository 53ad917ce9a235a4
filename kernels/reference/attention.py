"""Paged attention in plain torch: gather blocks into dense K/V, attend with SDPA.

One layer of the pool, [num_blocks, 2, num_kv_heads, block_size, head_dim], is read as a matrix whose rows are
(block, K or V, head) and hold block_size * head_dim elements. A single index_select of planned row numbers then
yields K and V of a group of sequences as [2, B, num_kv_heads, L, head_dim], and everything that does not depend on
the layer (row numbers, masks, rotations) is computed once per step.

Sequences are grouped by length, so that padding stays small and a group's K/V stays in the cache between the gather
and the products. What a row must not see is masked, and also zeroed in the gathered copy, because an unused slot may
hold a NaN from another sequence's life, and 0 * NaN is NaN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..backend import AttentionSpec
from .attention_plan import AttentionGroup, AttentionPlan, chunk_mask


def rope_and_write_kv(
    qkv: torch.Tensor, rope_table: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, spec: AttentionSpec
) -> torch.Tensor:
    """See `KernelBackend.rope_and_write_kv`. Rotates within `qkv`, in fp32; the returned q is a view of it."""
    num_tokens = qkv.shape[0]
    num_rotated = spec.num_heads + spec.num_kv_heads
    heads = qkv.view(num_tokens, num_rotated + spec.num_kv_heads, spec.head_dim)
    if plan.rotation is None or plan.rotation[0] is not rope_table:
        rows = rope_table.index_select(0, plan.positions)[:, None, :]  # [num_tokens, 1, rotary_dim]
        cos, sin = rows.chunk(2, dim=-1)  # each [num_tokens, 1, rotary_dim / 2]
        plan.rotation = (rope_table, torch.cat((cos, cos), dim=-1), sin.contiguous())
    _, cosines, sines = plan.rotation
    half = sines.shape[-1]
    x = heads[:, :num_rotated, : 2 * half]  # [num_tokens, num_heads + num_kv_heads, rotary_dim]
    rotated = x * cosines  # fp32
    rotated[..., :half].addcmul_(x[..., half:], sines, value=-1)
    rotated[..., half:].addcmul_(x[..., :half], sines)
    x.copy_(rotated)
    new_kv = heads[:, spec.num_heads :].reshape(-1, spec.head_dim)  # [num_tokens * 2 * num_kv_heads, head_dim]
    kv_layer.view(-1, spec.head_dim).index_copy_(0, plan.write_rows, new_kv)
    return heads[:, : spec.num_heads]


def attend(q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, spec: AttentionSpec) -> torch.Tensor:
    """See `KernelBackend.attention`."""
    out = torch.empty((q.shape[0], spec.num_heads * spec.head_dim), dtype=q.dtype, device=q.device)
    if plan.decode_groups:
        _attend_decode(q[: plan.num_decode_rows], kv_layer, plan, spec, out[: plan.num_decode_rows])
    for group in plan.prefill_groups:
        _attend_prefill(q, kv_layer, plan, group, spec, out)
    return out


def _gather(
    kv_layer: torch.Tensor, group: AttentionGroup, spec: AttentionSpec, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense K and V of a group, each [B, num_kv_heads, max_context_len, head_dim], zero beyond each row's context."""
    width = block_size * spec.head_dim
    gathered = kv_layer.view(-1, width).index_select(0, group.gather_rows)
    if group.unused_slots is not None:
        gathered.view(-1, spec.head_dim).index_fill_(0, group.unused_slots, 0)
    kv = gathered.view(2, len(group.rows.rows), spec.num_kv_heads, -1, spec.head_dim)
    kv = kv[:, :, :, : group.rows.max_context_len]
    return kv[0], kv[1]


def _attend_decode(
    q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, spec: AttentionSpec, out: torch.Tensor
) -> None:
    """q [num_decode_rows, num_heads, head_dim] → out [num_decode_rows, num_heads * head_dim].

    The query heads that share a K/V head stand in SDPA's query axis, so that K/V need not be repeated for them.
    """
    if plan.decode_order is not None:
        q = q.index_select(0, plan.decode_order)
    ordered = out if plan.decode_order is None else torch.empty_like(out)
    start = 0
    for group in plan.decode_groups:
        stop = start + len(group.rows.rows)
        keys, values = _gather(kv_layer, group, spec, plan.block_size)
        queries = q[start:stop].view(
            stop - start, spec.num_kv_heads, -1, spec.head_dim
        )  # [B, num_kv_heads, group, head_dim]
        if spec.soft_cap:
            result = _capped_attention(queries, keys, values, group.decode_mask, spec)
        else:
            result = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=group.decode_mask, scale=spec.scale
            )  # [B, num_kv_heads, group, head_dim]
        ordered[start:stop] = result.reshape(stop - start, -1)
        start = stop
    if plan.decode_order is not None:
        out.index_copy_(0, plan.decode_order, ordered)


def _attend_prefill(
    q: torch.Tensor,
    kv_layer: torch.Tensor,
    plan: AttentionPlan,
    group: AttentionGroup,
    spec: AttentionSpec,
    out: torch.Tensor,
) -> None:
    """q [num_tokens, num_heads, head_dim] → the group's rows of out [num_tokens, num_heads * head_dim]."""
    keys, values = _gather(kv_layer, group, spec, plan.block_size)
    num_rows, num_queries = len(group.rows.rows), group.rows.max_query_len
    first = group.first_token
    tokens = group.query_tokens
    queries = q[first : first + num_queries] if tokens is None else q.index_select(0, tokens)
    queries = queries.view(num_rows, num_queries, spec.num_heads, spec.head_dim).transpose(1, 2)
    result = _attend_chunks(queries, keys, values, plan, group, spec)  # [B, num_heads, Q, head_dim]
    result = result.transpose(1, 2).reshape(num_rows * num_queries, -1)
    if group.valid_queries is None or group.valid_tokens is None:
        out[first : first + num_queries] = result
    else:
        out.index_copy_(0, group.valid_tokens, result.index_select(0, group.valid_queries))


def _attend_chunks(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    plan: AttentionPlan,
    group: AttentionGroup,
    spec: AttentionSpec,
) -> torch.Tensor:
    num_rows, num_heads = queries.shape[:2]
    heads = plan.masks.heads(spec)
    results = []
    for chunk in group.chunks:
        mask = chunk.mask if chunk.mask is not None else chunk_mask(group, chunk, plan.dtype, heads, plan.window)
        part = queries[:, :, chunk.start : chunk.stop]  # [B, num_heads, q, head_dim]
        if mask is not None:  # [B, num_heads / heads, heads * q, head_dim]
            part = part.reshape(num_rows, num_heads // heads, -1, spec.head_dim)
        seen_keys, seen_values = keys[:, :, : chunk.num_keys], values[:, :, : chunk.num_keys]
        if spec.soft_cap:
            result = _capped_attention(part, seen_keys, seen_values, mask, spec)
        else:
            result = F.scaled_dot_product_attention(
                part,
                seen_keys,
                seen_values,
                attn_mask=mask,
                is_causal=group.rows.from_start,
                scale=spec.scale,
                enable_gqa=part.shape[1] != spec.num_kv_heads,
            )
        results.append(result.reshape(num_rows, num_heads, -1, spec.head_dim))
    return results[0] if len(results) == 1 else torch.cat(results, dim=2)


def _capped_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, spec: AttentionSpec
) -> torch.Tensor:
    """SDPA has no soft cap. queries [B, num_kv_heads, q, head_dim], keys and values [B, num_kv_heads, L, head_dim],
    mask [B, 1, q, L] → as queries."""
    scores = torch.matmul(queries, keys.transpose(2, 3)).float().mul_(spec.scale / spec.soft_cap)
    scores.tanh_().mul_(spec.soft_cap)
    if mask is not None:
        scores.add_(mask)
    return torch.matmul(scores.softmax(-1).to(values.dtype), values)
