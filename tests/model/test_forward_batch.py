"""Scheduled rows as tensors, against the definition spelled out token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.kernels.backend import AttentionInputs
from octavo.model.block_tables import BlockTables
from octavo.model.forward_batch import ForwardBatch, build_forward_batch
from octavo.scheduler.batch import ScheduledBatch, ScheduledRow
from octavo.scheduler.sampling_params import SamplingParams


@st.composite
def batches(draw: Any) -> tuple[ScheduledBatch, int, int]:
    block_size = draw(st.sampled_from([16, 32]))
    num_groups = draw(st.integers(1, 3))
    num_decode = draw(st.integers(0, 4))
    rows = []
    for index in range(num_decode + draw(st.integers(0 if num_decode else 1, 4))):
        length = draw(st.integers(2, 90))
        if index < num_decode:
            computed, scheduled = length - 1, 1
        else:
            computed = draw(st.integers(0, length - 1))
            scheduled = draw(st.integers(1, length - computed))
        num_blocks = -(-(computed + scheduled) // block_size) + draw(st.integers(0, 2))
        lists = st.lists(st.integers(1, 1000), min_size=num_blocks, max_size=num_blocks)
        blocks = tuple(draw(lists) for _ in range(num_groups))
        tokens = draw(st.lists(st.integers(0, 9999), min_size=length, max_size=length))
        rows.append(ScheduledRow(str(index), tokens, 1, computed, scheduled, blocks, SamplingParams(), 0))
    return ScheduledBatch(rows, num_decode), block_size, num_groups


@given(case=batches())
@settings(max_examples=100, deadline=None)
def test_every_token_stands_where_its_row_says(case):
    batch, block_size, num_groups = case
    tables = [BlockTables(group) for group in range(num_groups)]
    forward = build_forward_batch(batch, block_size, torch.device("cpu"), tables)
    for group, attention in enumerate(forward.attention):
        check(batch, block_size, forward, attention, group)


def check(
    batch: ScheduledBatch, block_size: int, forward: ForwardBatch, attention: AttentionInputs, group: int
) -> None:
    tokens, positions, slots, last_tokens = [], [], [], []
    for index, row in enumerate(batch.rows):
        assert attention.query_starts[index] == len(tokens)
        for position in range(row.num_computed_tokens, row.num_tokens_after):
            tokens.append(row.token_ids[position])
            positions.append(position)
            slots.append(row.block_ids[group][position // block_size] * block_size + position % block_size)
        if row.draws_token:
            last_tokens.append(len(tokens) - 1)
        used = -(-row.num_tokens_after // block_size)
        table = attention.block_tables[index].tolist()
        assert table[:used] == row.block_ids[group][:used]
        assert not any(table[used:])
    assert forward.token_ids.tolist() == tokens
    assert attention.positions.tolist() == positions
    assert attention.slots.tolist() == slots
    assert forward.logits_indices.tolist() == last_tokens
    assert forward.drawing_rows == [row for row in batch.rows if row.draws_token]
    assert attention.query_starts[-1] == len(tokens)
    assert attention.context_lens == attention.kv_lens.tolist() == [row.num_tokens_after for row in batch.rows]
    assert attention.query_lens == [row.num_scheduled_tokens for row in batch.rows]
    prefill = attention.query_lens[batch.num_decode_rows :]
    assert attention.max_query_len == max(prefill, default=0)
    assert attention.block_tables.shape[1] == max(-(-n // block_size) for n in attention.context_lens)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_kept_tables_follow_growth_copies_preemption_and_reuse(data):
    """The scheduler's lists change in place between steps, in every way that a table may."""
    tables = BlockTables()
    live = {str(index): data.draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=8)) for index in range(3)}
    for _ in range(data.draw(st.integers(1, 8))):
        seq_id = data.draw(st.sampled_from(sorted(live)))
        change = data.draw(st.sampled_from(["grow", "copy", "pass", "preempt", "drop", "nothing"]))
        if change == "grow":
            live[seq_id] += data.draw(st.lists(st.integers(1, 10**6), max_size=3))
        elif change == "copy":
            live[seq_id][data.draw(st.integers(0, len(live[seq_id]) - 1))] = data.draw(st.integers(1, 10**6))
        elif change == "pass":
            count = data.draw(st.integers(0, len(live[seq_id]) - 1))
            live[seq_id][:count] = [0] * count
        elif change == "preempt":
            live[seq_id][:] = data.draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=4))
        elif change == "drop":
            tables.drop([seq_id, "unknown"])
        rows = [ScheduledRow(key, [0], 1, 0, 1, (ids,), SamplingParams(), 0) for key, ids in live.items()]
        counts = [data.draw(st.integers(1, len(ids))) for ids in live.values()]
        width = max(counts)
        expected = [ids[:count] + [0] * (width - count) for ids, count in zip(live.values(), counts, strict=True)]
        assert tables.gather(rows, np.array(counts)).tolist() == expected
