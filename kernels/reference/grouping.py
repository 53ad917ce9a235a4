"""Which rows of a step attend together. Plain integers on the host; no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..backend import AttentionInputs, AttentionSpec


@dataclass(slots=True, frozen=True)
class GroupLimits:
    max_bytes: int
    """Gathered K/V of a group, padding included; a single row may exceed it."""
    max_padding: float
    """Padded work of a group, as a multiple of its real work. Bounds the groups to a logarithm of the lengths."""


@dataclass(slots=True, frozen=True)
class RowGroup:
    """Rows that attend together, padded to the longest of them."""

    rows: Sequence[int]
    """Row numbers in the batch. [B]"""
    query_lens: Sequence[int]
    context_lens: Sequence[int]
    """Keys of each row, from the start of its first block on. [B]"""
    first_blocks: Sequence[int]
    """The block of each row's table in which its first query's window begins; 0 without a window. [B]"""
    first_token: int
    """Of the first row."""
    from_start: bool
    """No row has context from earlier steps, nor a window that hides any, so that query i of each row sees keys 0 to
    i, and nothing is asked of the scores but their softmax."""

    @property
    def max_query_len(self) -> int:
        return max(self.query_lens)

    @property
    def has_offsets(self) -> bool:
        return any(self.first_blocks)

    @property
    def max_context_len(self) -> int:
        return max(self.context_lens)

    @property
    def max_num_computed(self) -> int:
        return max(k - q for k, q in zip(self.context_lens, self.query_lens, strict=True))

    def num_blocks(self, block_size: int) -> int:
        return -(-self.max_context_len // block_size)


@dataclass(slots=True)
class _Item:
    row: int
    first_token: int
    query_len: int
    context_len: int
    first_block: int
    from_start: bool


def _item(row: int, first_token: int, inputs: AttentionInputs, spec: AttentionSpec, block_size: int) -> _Item:
    query_len, context_len = inputs.query_lens[row], inputs.context_lens[row]
    # The first query stands at context_len - query_len, and sees `window` keys up to that.
    first_block = max(0, context_len - query_len + 1 - spec.window) // block_size if spec.window else 0
    is_plain = not spec.soft_cap and (not spec.window or query_len <= spec.window)
    return _Item(
        row=row,
        first_token=first_token,
        query_len=query_len,
        context_len=context_len - first_block * block_size,
        first_block=first_block,
        from_start=is_plain and query_len == context_len,
    )


def group_decode_rows(
    inputs: AttentionInputs, spec: AttentionSpec, block_size: int, block_bytes: int, limits: GroupLimits
) -> list[RowGroup]:
    """Rows [0, num_decode_rows) by context length. `block_bytes`: K and V of one block, one layer."""
    items = [_item(row, row, inputs, spec, block_size) for row in range(inputs.num_decode_rows)]
    items.sort(key=lambda item: -(-item.context_len // block_size))
    return _pack(items, block_size, block_bytes, limits)


def group_prefill_rows(
    inputs: AttentionInputs, spec: AttentionSpec, block_size: int, block_bytes: int, limits: GroupLimits
) -> list[RowGroup]:
    """The other rows: those that begin their sequence apart from those that continue it, each by their lengths."""
    first_token = inputs.num_decode_rows
    items = []
    for row in range(inputs.num_decode_rows, inputs.num_rows):
        items.append(_item(row, first_token, inputs, spec, block_size))
        first_token += inputs.query_lens[row]
    items.sort(key=lambda item: (item.from_start, item.query_len, item.context_len))
    return _pack(items, block_size, block_bytes, limits)


def _pack(items: list[_Item], block_size: int, block_bytes: int, limits: GroupLimits) -> list[RowGroup]:
    """Cut the sorted list wherever one more row would break a limit."""
    groups: list[list[_Item]] = []
    real_work = max_query = max_blocks = 0
    for item in items:
        blocks = -(-item.context_len // block_size)
        work = item.query_len * blocks
        count = len(groups[-1]) + 1 if groups else 1
        query, block_count = max(max_query, item.query_len), max(max_blocks, blocks)
        fits = (
            bool(groups)
            and groups[-1][0].from_start == item.from_start
            and count * block_count * block_bytes <= limits.max_bytes
            and count * query * block_count <= limits.max_padding * (real_work + work)
        )
        if fits:
            groups[-1].append(item)
            real_work, max_query, max_blocks = real_work + work, query, block_count
        else:
            groups.append([item])
            real_work, max_query, max_blocks = work, item.query_len, blocks
    return [
        RowGroup(
            rows=[item.row for item in group],
            query_lens=[item.query_len for item in group],
            context_lens=[item.context_len for item in group],
            first_blocks=[item.first_block for item in group],
            first_token=group[0].first_token,
            from_start=group[0].from_start and group[0].query_len > 0,
        )
        for group in groups
    ]
