"""A scheduled batch as tensors: what the model reads in one step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ..kernels.backend import AttentionInputs
from ..scheduler.batch import ScheduledBatch, ScheduledRow
from .block_tables import BlockTables
from .device import to_device

_Ints = npt.NDArray[np.int64]


@dataclass(slots=True, frozen=True)
class ForwardBatch:
    """One step's tokens, row after row, and where they belong."""

    token_ids: torch.Tensor  # int64 [num_tokens]
    attention: tuple[AttentionInputs, ...]
    """For each layer group; they differ in slots and block tables."""
    logits_indices: torch.Tensor  # int64 [num_drawing], the last token of each row that draws
    drawing_rows: list[ScheduledRow]
    """In batch order. [num_drawing]"""


def build_forward_batch(
    batch: ScheduledBatch, block_size: int, device: torch.device, block_tables: Sequence[BlockTables]
) -> ForwardBatch:
    """Read the rows' live views once and move the result to the device. The batch must not be empty."""
    rows = batch.rows
    num_rows = len(rows)
    computed = np.array([row.num_computed_tokens for row in rows])
    query_lens = np.array([row.num_scheduled_tokens for row in rows])
    context_lens = computed + query_lens
    query_starts = np.zeros(num_rows + 1, np.int64)
    np.cumsum(query_lens, out=query_starts[1:])
    num_tokens = int(query_starts[-1])

    row_of_token = np.repeat(np.arange(num_rows), query_lens)
    positions = np.arange(num_tokens) - query_starts[row_of_token] + computed[row_of_token]
    draws = np.array([row.draws_token for row in rows])

    num_blocks = -(-context_lens // block_size)
    tables = [group.gather(rows, num_blocks) for group in block_tables]  # each [num_rows, max_blocks]
    common = AttentionInputs(
        num_rows=num_rows,
        num_decode_rows=batch.num_decode_rows,
        max_query_len=int(query_lens[batch.num_decode_rows :].max(initial=0)),
        query_lens=query_lens.tolist(),
        context_lens=context_lens.tolist(),
        query_starts=to_device(query_starts, device),
        kv_lens=to_device(context_lens, device),
        positions=to_device(positions, device),
        slots=to_device(_slots(tables[0], row_of_token, positions, block_size), device),
        block_tables=to_device(tables[0], device),
    )
    others = [
        replace(
            common,
            slots=to_device(_slots(table, row_of_token, positions, block_size), device),
            block_tables=to_device(table, device),
        )
        for table in tables[1:]
    ]
    return ForwardBatch(
        token_ids=to_device(_token_ids(batch, num_tokens), device),
        attention=(common, *others),
        logits_indices=to_device(query_starts[1:][draws] - 1, device),
        drawing_rows=list(itertools.compress(rows, draws.tolist())),
    )


def _slots(tables: _Ints, row_of_token: _Ints, positions: _Ints, block_size: int) -> _Ints:
    """Where each token's K/V go. [num_tokens]"""
    return tables[row_of_token, positions // block_size] * block_size + positions % block_size


def _token_ids(batch: ScheduledBatch, num_tokens: int) -> _Ints:
    """The tokens run in this step, 0 for one that the host does not know yet. [num_tokens]"""
    token_ids = np.zeros(num_tokens, np.int64)
    num_decodes = batch.num_decode_rows
    token_ids[:num_decodes] = [
        0 if row.num_unknown_tokens and row.draws_token else row.token_ids[row.num_computed_tokens]
        for row in batch.rows[:num_decodes]
    ]
    start = num_decodes
    for row in batch.rows[num_decodes:]:
        known = row.token_ids[row.num_computed_tokens : row.num_tokens_after]
        token_ids[start : start + len(known)] = known
        start += row.num_scheduled_tokens
    return token_ids
