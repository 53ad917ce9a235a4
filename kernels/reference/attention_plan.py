"""What all attention layers of a step share: who attends together, index tensors, masks. See attention.py.

A layer with a window reads a row from the block on that holds the first key its first query sees:

    blocks of the row    │ never read │ never read │  first  │         │  last   │
    keys                                            ··├──── seen ─────────────┤

Keys are then counted from the start of that first block, so that everything below is as without a window, but that a
query does not see keys more than a window behind it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ..backend import AttentionInputs, AttentionSpec
from .grouping import GroupLimits, RowGroup, group_decode_rows, group_prefill_rows

_MASK_ALIGNMENT_CUDA = 16
"""Rows of a mask begin at multiples of so many elements, or CUDA's fused kernels copy it in every layer."""
_DECODE_LIMITS_CPU = GroupLimits(max_bytes=3 * 2**19, max_padding=2.0)
_DECODE_LIMITS_CUDA = GroupLimits(max_bytes=2**28, max_padding=1.5)
_PREFILL_LIMITS = GroupLimits(max_bytes=2**26, max_padding=1.25)


@dataclass(slots=True, frozen=True)
class MaskLimits:
    """How masked prefill is cut, and where the query heads that share a K/V head stand.

    CPU's kernel reads shared K/V and a mask as they are. CUDA's kernels that take a mask do not share K/V between
    heads, so there the heads stand in the query axis, as they do for decode, and the mask is repeated for them.
    """

    folded: bool
    chunk_elements: int
    """Masks are built for at most this many (query, key) pairs at a time, or one query: queries are cut into chunks."""
    kept_elements: int
    """Masks of one step, all its groups together, are kept for all layers up to this many elements; the others are
    rebuilt in each layer."""

    def heads(self, spec: AttentionSpec) -> int:
        """How often a mask is repeated."""
        return spec.num_heads // spec.num_kv_heads if self.folded else 1


_MASKS_CPU = MaskLimits(folded=False, chunk_elements=2**22, kept_elements=2**25)
_MASKS_CUDA = MaskLimits(folded=True, chunk_elements=2**26, kept_elements=2**28)
_MASKS_CAPPED = MaskLimits(folded=True, chunk_elements=2**20, kept_elements=2**25)
"""Capped scores are written out, in fp32, for all heads of a chunk."""


def _mask_limits(spec: AttentionSpec, *, on_cpu: bool) -> MaskLimits:
    if spec.soft_cap:
        return _MASKS_CAPPED
    return _MASKS_CPU if on_cpu else _MASKS_CUDA


def workspace_bytes(
    spec: AttentionSpec,
    block_size: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """See `KernelBackend.attention_workspace_bytes`."""
    on_cpu = device.type == "cpu"
    tokens, length = max_num_batched_tokens, max_model_len
    if spec.window:
        length = min(length, spec.window + tokens + block_size)
    masks, decode = _mask_limits(spec, on_cpu=on_cpu), _DECODE_LIMITS_CPU if on_cpu else _DECODE_LIMITS_CUDA
    row = 2 * spec.num_kv_heads * spec.head_dim * (-(-length // block_size) * block_size) * dtype.itemsize
    gathered = max(row, min(tokens * row, max(decode.max_bytes, _PREFILL_LIMITS.max_bytes)))
    pairs = math.ceil(_PREFILL_LIMITS.max_padding * tokens * length) * masks.heads(spec)
    chunk = min(pairs, max(masks.chunk_elements, length * masks.heads(spec)))
    mask_bytes = min(pairs, masks.kept_elements) * dtype.itemsize + chunk * (dtype.itemsize + 2)
    queries = 4 * tokens * spec.num_heads * spec.head_dim * dtype.itemsize
    # CUDA's fused kernels want heads of a multiple of 8; without them torch writes scores out, and their softmax.
    unfused = not on_cpu and spec.head_dim % 8 != 0
    scores = max(chunk * spec.num_kv_heads, min(tokens, length) ** 2 * spec.num_heads) if unfused else 0
    if spec.soft_cap:
        decoded = min(tokens * length, max(length, decode.max_bytes // (2 * spec.head_dim * dtype.itemsize)))
        scores = max(chunk * spec.num_kv_heads, decoded * spec.num_heads)
    # A quarter more for index tensors.
    return gathered * 5 // 4 + mask_bytes + queries + 2 * 4 * scores


@dataclass(slots=True)
class QueryChunk:
    """Queries [start, stop) of every row of a group, against keys [0, num_keys)."""

    start: int
    stop: int
    num_keys: int
    mask: torch.Tensor | None = None
    """[B, 1, mask heads * (stop - start), num_keys], 0 or -inf; None: to be built when used, where one is needed."""


@dataclass(slots=True)
class AttentionGroup:
    """Rows that attend together, and the index tensors their gather needs."""

    rows: RowGroup
    gather_rows: torch.Tensor  # int64 [2 * B * num_kv_heads * blocks per row]
    unused_slots: torch.Tensor | None  # int64 [num_unused], in units of head_dim elements of the gathered copy
    decode_mask: torch.Tensor | None = None  # [B, 1, 1, L], 0 or -inf
    first_token: int = 0
    """Where the queries of a group of one row begin; larger groups use the two index tensors."""
    query_tokens: torch.Tensor | None = None  # int64 [B * Q], padded with each row's last token
    valid_queries: torch.Tensor | None = None  # int64 [num_valid], positions in query_tokens that are no padding
    valid_tokens: torch.Tensor | None = None  # int64 [num_valid], the tokens there
    query_positions: torch.Tensor | None = None  # int64 [B, Q], among the gathered keys; None where the causal triangle
    # says it all
    chunks: list[QueryChunk] = field(default_factory=list)


@dataclass(slots=True)
class AttentionPlan:
    """What all attention layers of one step share, as far as they have the same shape and window."""

    dtype: torch.dtype
    masks: MaskLimits
    window: int
    block_size: int
    num_decode_rows: int
    positions: torch.Tensor  # int64 [num_tokens]
    write_rows: torch.Tensor  # int64 [num_tokens * 2 * num_kv_heads], in units of head_dim elements of the layer
    decode_groups: list[AttentionGroup]
    prefill_groups: list[AttentionGroup]
    decode_order: torch.Tensor | None = None  # int64 [num_decode_rows], rows as the groups take them; None: as is
    rotation: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    """The table of the last rotation, its cosines [num_tokens, 1, rotary_dim] and sines [num_tokens, 1, half]."""


def plan_attention(inputs: AttentionInputs, spec: AttentionSpec, block_size: int, dtype: torch.dtype) -> AttentionPlan:
    """Group the rows and compute the index tensors; host work is linear in rows, all else tensor operations."""
    block_bytes = 2 * spec.num_kv_heads * block_size * spec.head_dim * dtype.itemsize
    on_cpu = inputs.positions.device.type == "cpu"
    limits, masks = _DECODE_LIMITS_CPU if on_cpu else _DECODE_LIMITS_CUDA, _mask_limits(spec, on_cpu=on_cpu)
    decode_rows = group_decode_rows(inputs, spec, block_size, block_bytes, limits)
    order = [row for group in decode_rows for row in group.rows]
    in_order = order == list(range(len(order)))
    prefill_groups = [
        _prefill_group(inputs, rows, spec, block_size, masks)
        for rows in group_prefill_rows(inputs, spec, block_size, block_bytes, _PREFILL_LIMITS)
    ]
    _keep_masks(prefill_groups, dtype, masks, spec)
    return AttentionPlan(
        dtype=dtype,
        masks=masks,
        window=spec.window,
        block_size=block_size,
        num_decode_rows=inputs.num_decode_rows,
        positions=inputs.positions,
        write_rows=_write_rows(inputs.slots, spec.num_kv_heads, block_size),
        decode_groups=[_decode_group(inputs, rows, spec, block_size, dtype) for rows in decode_rows],
        prefill_groups=prefill_groups,
        decode_order=None if in_order else torch.tensor(order, device=inputs.positions.device),
    )


def _write_rows(slots: torch.Tensor, num_kv_heads: int, block_size: int) -> torch.Tensor:
    """Where each token's K heads and then V heads go, as rows of the layer seen as [.., head_dim]."""
    blocks = torch.div(slots, block_size, rounding_mode="floor")  # [num_tokens]
    heads = torch.arange(2 * num_kv_heads, device=slots.device) * block_size  # [2 * num_kv_heads]
    first = blocks * (2 * num_kv_heads * block_size) + slots % block_size  # [num_tokens]
    return (first[:, None] + heads).view(-1)


def _gather_group(inputs: AttentionInputs, rows: RowGroup, spec: AttentionSpec, block_size: int) -> AttentionGroup:
    device = inputs.positions.device
    num_blocks = rows.num_blocks(block_size)
    row_ids = torch.tensor(rows.rows, device=device)  # [B]
    tables = inputs.block_tables.index_select(0, row_ids)  # [B, max_blocks]
    blocks = tables[:, :num_blocks]
    if rows.has_offsets:
        columns = torch.tensor(rows.first_blocks, device=device)[:, None] + torch.arange(num_blocks, device=device)
        blocks = tables.gather(1, columns.clamp_(max=tables.shape[1] - 1))  # [B, num_blocks]
    halves = torch.arange(2, device=device)[:, None, None, None]
    heads = torch.arange(spec.num_kv_heads, device=device)[None, None, :, None]
    gather = (blocks[None, :, None, :] * 2 + halves) * spec.num_kv_heads + heads  # [2, B, num_kv_heads, num_blocks]
    unused = None
    if min(rows.context_lens) < rows.max_context_len:
        lens = torch.tensor(rows.context_lens, device=device)  # [B]
        length = num_blocks * block_size
        row, slot = (torch.arange(length, device=device) >= lens[:, None]).nonzero(as_tuple=True)  # [num_unused]
        copies = torch.arange(2 * spec.num_kv_heads, device=device)[:, None]
        half, head = copies // spec.num_kv_heads, copies % spec.num_kv_heads
        unused = (((half * len(rows.rows) + row) * spec.num_kv_heads + head) * length + slot).view(-1)
    return AttentionGroup(rows=rows, gather_rows=gather.reshape(-1), unused_slots=unused)


def _decode_group(
    inputs: AttentionInputs, rows: RowGroup, spec: AttentionSpec, block_size: int, dtype: torch.dtype
) -> AttentionGroup:
    group = _gather_group(inputs, rows, spec, block_size)
    if group.unused_slots is not None or (spec.window and rows.max_context_len > spec.window):
        device = inputs.positions.device
        lens = torch.tensor(rows.context_lens, device=device)[:, None]  # [B, 1]
        keys = torch.arange(rows.max_context_len, device=device)
        seen = keys < lens  # [B, L]
        if spec.window:
            seen &= keys >= lens - spec.window
        group.decode_mask = _additive(seen[:, None], dtype, 1)
    return group


def _prefill_group(
    inputs: AttentionInputs, rows: RowGroup, spec: AttentionSpec, block_size: int, masks: MaskLimits
) -> AttentionGroup:
    group = _gather_group(inputs, rows, spec, block_size)
    device = inputs.positions.device
    row_ids = torch.tensor(rows.rows, device=device)  # [B]
    starts = inputs.query_starts.index_select(0, row_ids)[:, None]  # [B, 1]
    lens = torch.tensor(rows.query_lens, device=device)[:, None]  # [B, 1]
    offsets = torch.arange(rows.max_query_len, device=device)[None]  # [1, Q]
    tokens = (starts + torch.minimum(offsets, lens - 1)).view(-1)  # [B * Q]
    if len(rows.rows) == 1:
        group.first_token = rows.first_token
    else:
        group.query_tokens = tokens
        group.valid_queries = (offsets < lens).view(-1).nonzero().view(-1)
        group.valid_tokens = tokens.index_select(0, group.valid_queries)
    if not rows.from_start:
        group.query_positions = inputs.positions.index_select(0, tokens).view(len(rows.rows), -1)
        if rows.has_offsets:
            first_keys = torch.tensor(rows.first_blocks, device=device)[:, None] * block_size
            group.query_positions = group.query_positions - first_keys
    group.chunks = list(_chunk_queries(rows, masks.chunk_elements // masks.heads(spec)))
    return group


def _chunk_queries(rows: RowGroup, max_pairs: int) -> Iterator[QueryChunk]:
    """Rows that start their sequence need no mask, hence no chunks; others are cut to bound the mask."""
    length, queries = rows.max_context_len, rows.max_query_len
    if rows.from_start:
        yield QueryChunk(0, queries, queries)
        return
    step = max(1, max_pairs // (length * len(rows.rows)))
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        # No query of the chunk lies further on than this in its sequence, whichever its row.
        num_keys = min(length, rows.max_num_computed + stop)
        yield QueryChunk(start, stop, num_keys)


def _keep_masks(groups: list[AttentionGroup], dtype: torch.dtype, masks: MaskLimits, spec: AttentionSpec) -> None:
    """Build masks now, chunk by chunk over all groups of the step, as far as the limit goes."""
    left = masks.kept_elements
    for group in groups:
        if group.query_positions is None:
            continue
        for chunk in group.chunks:
            left -= len(group.rows.rows) * masks.heads(spec) * (chunk.stop - chunk.start) * chunk.num_keys
            if left < 0:
                return
            chunk.mask = chunk_mask(group, chunk, dtype, masks.heads(spec), spec.window)


def chunk_mask(
    group: AttentionGroup, chunk: QueryChunk, dtype: torch.dtype, heads: int, window: int
) -> torch.Tensor | None:
    """[B, 1, heads * q, num_keys], 0 or -inf; None where the causal triangle says it all."""
    if group.query_positions is None:
        return None
    positions = group.query_positions[:, chunk.start : chunk.stop, None]  # [B, q, 1]
    keys = torch.arange(chunk.num_keys, device=positions.device)  # [num_keys]
    seen = keys <= positions
    if window:
        seen &= keys > positions - window
    return _additive(seen, dtype, heads)


def _additive(seen: torch.Tensor, dtype: torch.dtype, heads: int) -> torch.Tensor:
    """bool [B, q, L] → [B, 1, heads * q, L], 0 where seen, -inf elsewhere: the form SDPA adds without converting it in
    each layer."""
    num_rows, num_queries, length = seen.shape
    alignment = 1 if seen.device.type == "cpu" else _MASK_ALIGNMENT_CUDA
    width = -(-length // alignment) * alignment
    mask = torch.zeros((num_rows, heads, num_queries, width), dtype=dtype, device=seen.device)[..., :length]
    mask.masked_fill_(seen.logical_not()[:, None], float("-inf"))
    return mask.flatten(1, 2)[:, None]
