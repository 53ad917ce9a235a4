"""Planned, grouped, gathered attention against attention written out for one query at a time."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import pytest
import torch
from octavo.kernels.backend import AttentionInputs, AttentionSpec
from octavo.kernels.reference import attention, attention_plan
from octavo.kernels.reference import backend as backend_module
from octavo.kernels.reference.attention_plan import MaskLimits
from octavo.kernels.reference.backend import ReferenceBackend
from octavo.kernels.reference.grouping import GroupLimits

BLOCK = 16
SPEC = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=16, scale=0.3)
CPU = torch.device("cpu")


def make_inputs(decode_contexts: Sequence[int], prefills: Sequence[tuple[int, int]], seed: int = 0) -> AttentionInputs:
    """`prefills`: (queries, context) of each row. Blocks are handed out at random; block 0 is nobody's."""
    query_lens = [1] * len(decode_contexts) + [queries for queries, _ in prefills]
    context_lens = [*decode_contexts, *(context for _, context in prefills)]
    counts = [-(-context // BLOCK) for context in context_lens]
    blocks = list(range(1, sum(counts) + 1))
    random.Random(seed).shuffle(blocks)
    tables = torch.zeros(len(counts), max(counts), dtype=torch.int64)
    positions, slots = [], []
    for row, count in enumerate(counts):
        tables[row, :count] = torch.tensor([blocks.pop() for _ in range(count)])
        for position in range(context_lens[row] - query_lens[row], context_lens[row]):
            positions.append(position)
            slots.append(int(tables[row, position // BLOCK]) * BLOCK + position % BLOCK)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), torch.tensor(query_lens).cumsum(0)))
    return AttentionInputs(
        num_rows=len(counts),
        num_decode_rows=len(decode_contexts),
        max_query_len=max((queries for queries, _ in prefills), default=0),
        query_lens=query_lens,
        context_lens=context_lens,
        query_starts=starts,
        kv_lens=torch.tensor(context_lens),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        block_tables=tables,
    )


def poisoned_pool(inputs: AttentionInputs, dtype: torch.dtype) -> torch.Tensor:
    """One layer with random K/V wherever a row's context lies, NaN everywhere else."""
    num_blocks = int(inputs.block_tables.max()) + 1
    layer = torch.full((num_blocks, 2, SPEC.num_kv_heads, BLOCK, SPEC.head_dim), math.nan, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for row, context in enumerate(inputs.context_lens):
        for position in range(context):
            block = inputs.block_tables[row, position // BLOCK]
            values = torch.randn(2, SPEC.num_kv_heads, SPEC.head_dim, generator=generator)
            layer[block, :, :, position % BLOCK] = values.to(dtype)
    return layer


def slow_attention(
    q: torch.Tensor, layer: torch.Tensor, inputs: AttentionInputs, spec: AttentionSpec = SPEC
) -> torch.Tensor:
    """fp64, one query after another."""
    out = []
    for row, (queries, context) in enumerate(zip(inputs.query_lens, inputs.context_lens, strict=True)):
        kv = layer[inputs.block_tables[row]].double()  # [blocks, 2, num_kv_heads, block, head_dim]
        keys, values = kv.permute(1, 2, 0, 3, 4).flatten(2, 3)  # each [num_kv_heads, length, head_dim]
        group = SPEC.num_heads // SPEC.num_kv_heads
        for index in range(queries):
            seen = context - queries + index + 1
            first = max(0, seen - spec.window) if spec.window else 0
            query = q[int(inputs.query_starts[row]) + index].double()  # [num_heads, head_dim]
            per_head = []
            for head in range(SPEC.num_heads):
                scores = keys[head // group, first:seen] @ query[head] * spec.scale
                if spec.soft_cap:
                    scores = (scores / spec.soft_cap).tanh() * spec.soft_cap
                per_head.append(scores.softmax(-1) @ values[head // group, first:seen])
            out.append(torch.cat(per_head))
    return torch.stack(out)


CASES: dict[str, tuple[list[int], list[tuple[int, int]]]] = {
    "decode_even": ([32, 32, 32], []),
    "decode_uneven": ([100, 3, 17, 64, 16, 1], []),
    "decode_skewed": ([500, *range(1, 12), 300], []),
    "prefill_fresh": ([], [(40, 40), (1, 1), (33, 33), (16, 16)]),
    "prefill_continued": ([], [(5, 70), (1, 20), (40, 41), (12, 300)]),
    "all_at_once": ([20, 180], [(7, 7), (30, 90), (2, 2), (30, 31), (8, 200)]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attention_equals_the_slow_one_whatever_lies_around(case, dtype, tolerance):
    inputs = make_inputs(*CASES[case])
    backend = ReferenceBackend(CPU, dtype)
    layer = poisoned_pool(inputs, dtype)
    q = torch.randn(len(inputs.positions), SPEC.num_heads, SPEC.head_dim).to(dtype)
    plan = backend.plan_attention(inputs, SPEC, BLOCK)
    out = backend.attention(q, layer, plan, SPEC)
    torch.testing.assert_close(out.double(), slow_attention(q, layer, inputs), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [0, 1, 5, 16, 37, 1000])
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_windows_and_caps_and_what_lies_left_of_every_window(case, window, soft_cap):
    """Blocks that no query of the step sees may hold anything, even another sequence's NaN."""
    spec = dataclasses.replace(SPEC, window=window, soft_cap=soft_cap)
    inputs = make_inputs(*CASES[case])
    layer = poisoned_pool(inputs, torch.float32)
    q = torch.randn(len(inputs.positions), SPEC.num_heads, SPEC.head_dim)
    expected = slow_attention(q, layer, inputs, spec)
    tables = inputs.block_tables.clone()
    for row, (queries, context) in enumerate(zip(inputs.query_lens, inputs.context_lens, strict=True)):
        if window:
            tables[row, : max(0, context - queries + 1 - window) // BLOCK] = 0
    layer[0] = math.nan
    backend = ReferenceBackend(CPU, torch.float32)
    plan = backend.plan_attention(dataclasses.replace(inputs, block_tables=tables), spec, BLOCK)
    out = backend.attention(q, layer, plan, spec)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", ["all", "some", "none"])
@pytest.mark.parametrize("folded", [True, False])
def test_long_masks_are_cut_into_chunks_and_kept_up_to_a_total(monkeypatch, folded, kept):
    group_size = 3 if folded else 1
    # Fresh rows need no mask; the others make two groups by their lengths.
    inputs = make_inputs([], [(70, 100), (65, 90), (6, 300), (20, 20)])
    elements = {"all": 2**25, "some": 10000 * group_size, "none": 0}[kept]
    monkeypatch.setattr(attention_plan, "_MASKS_CPU", MaskLimits(folded, 1500 * group_size, elements))
    plan = attention_plan.plan_attention(inputs, SPEC, BLOCK, torch.float32)
    masked = [group for group in plan.prefill_groups if group.query_positions is not None]
    assert len(masked) == 2
    chunks = [chunk for group in masked for chunk in group.chunks]
    assert len(chunks) > 5
    masks = [chunk.mask for chunk in chunks if chunk.mask is not None]
    assert sum(mask.numel() for mask in masks) <= elements
    assert all(mask.numel() <= 1500 * group_size for mask in masks)
    assert {"all": len(masks) == len(chunks), "some": 0 < len(masks) < len(chunks), "none": not masks}[kept]
    layer = poisoned_pool(inputs, torch.float32)
    q = torch.randn(161, SPEC.num_heads, SPEC.head_dim)
    out = attention.attend(q, layer, plan, SPEC)
    torch.testing.assert_close(out.double(), slow_attention(q, layer, inputs), rtol=1e-5, atol=1e-5)


def test_the_workspace_estimate_covers_gathered_kv_and_masks_of_a_long_context():
    length, tokens = 60_000, 512
    spec = AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128, scale=1.0)
    one_row = 2 * 8 * 128 * 2 * length
    for device in (CPU, torch.device("cuda")):
        estimate = attention_plan.workspace_bytes(spec, BLOCK, tokens, length, torch.bfloat16, device)
        masks = attention_plan._MASKS_CPU if device == CPU else attention_plan._MASKS_CUDA
        assert estimate > one_row + 2 * min(masks.kept_elements, tokens * length)
        assert estimate < 2**31
        assert attention_plan.workspace_bytes(spec, BLOCK, tokens, 64, torch.bfloat16, device) < estimate


def test_decode_groups_stay_within_memory(monkeypatch):
    monkeypatch.setattr(attention_plan, "_DECODE_LIMITS_CPU", GroupLimits(max_bytes=20 * 4096, max_padding=2.0))
    inputs = make_inputs([random.Random(0).randrange(1, 200) for _ in range(40)], [])
    plan = attention_plan.plan_attention(inputs, SPEC, BLOCK, torch.float32)
    for group in plan.decode_groups:
        num_blocks = group.rows.num_blocks(BLOCK) * len(group.rows.rows)
        assert num_blocks <= 20
        real = sum(-(-length // BLOCK) for length in group.rows.context_lens)
        assert num_blocks <= 2 * real
    assert sorted(row for group in plan.decode_groups for row in group.rows.rows) == list(range(40))


def test_rope_rotates_half_split_pairs_and_writes_where_the_slots_say():
    inputs = make_inputs([20, 3], [(5, 30), (4, 4)])
    num_tokens = len(inputs.positions)
    backend = ReferenceBackend(CPU, torch.float32)
    plan = backend.plan_attention(inputs, SPEC, BLOCK)
    for rotary_dim in (16, 8):
        qkv = torch.randn(num_tokens, (6 + 2 * 2) * 16)
        before = qkv.clone().view(num_tokens, 10, 16)
        table = torch.randn(40, rotary_dim)
        layer = torch.zeros(int(inputs.block_tables.max()) + 1, 2, 2, BLOCK, 16)
        q = backend.rope_and_write_kv(qkv, table, layer, plan, SPEC)
        half = rotary_dim // 2
        cos, sin = (part[:, None] for part in table[inputs.positions].chunk(2, dim=-1))
        first, second = before[..., :half], before[..., half:rotary_dim]
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin, before[..., rotary_dim:]), -1)
        torch.testing.assert_close(q, rotated[:, :6])
        expected = torch.zeros_like(layer)
        for token, slot in enumerate(inputs.slots.tolist()):
            expected[slot // BLOCK, 0, :, slot % BLOCK] = rotated[token, 6:8]
            expected[slot // BLOCK, 1, :, slot % BLOCK] = before[token, 8:]
        torch.testing.assert_close(layer, expected)


@pytest.mark.parametrize("max_bytes", [0, 3 * 512 * 2, 2**26])
def test_copy_blocks_reads_all_sources_of_a_layer_before_it_writes(monkeypatch, max_bytes):
    monkeypatch.setattr(backend_module, "_MAX_COPY_BYTES", max_bytes)
    pool = torch.randn(5, 6, 2, 2, 4, 8)
    before = pool.clone()
    ReferenceBackend(CPU, torch.float32).copy_blocks(pool, [1, 4, 2], [5, 2, 3])
    assert torch.equal(pool[:, [5, 2, 3]], before[:, [1, 4, 2]])
    assert torch.equal(pool[:, [0, 1, 4]], before[:, [0, 1, 4]])
