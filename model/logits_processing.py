"""What changes logits before a token is chosen: min_tokens, logit_bias, penalties, in this order.

The order and the formulas are vLLM's, so that a request means the same here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..scheduler.batch import ScheduledRow
from .device import ids_to_device, to_device
from .logit_edits import LogitEdits
from .sampler_state import TokenCounts


def process_logits(
    logits: torch.Tensor, rows: Sequence[ScheduledRow], edits: LogitEdits, counts: TokenCounts, chunk_rows: int
) -> torch.Tensor:
    """logits [n, vocab] → the same tensor where no row asks for anything, else a changed fp32 copy.

    Penalties touch whole rows several times, so they are applied to `chunk_rows` at once, which should fit the cache.
    """
    biased = [index for index, row in enumerate(rows) if row.params.logit_bias]
    penalised = [index for index, row in enumerate(rows) if row.params.has_penalties]
    held_back = [index for index, row in enumerate(rows) if row.num_output_tokens < row.params.min_tokens]
    if not (biased or penalised or held_back):
        return logits
    logits = logits.to(torch.float32, copy=True)
    if held_back:
        edits.forbid_stops(logits, rows, held_back)
    if biased:
        edits.add_bias(logits, rows, biased)
    for start in range(0, len(penalised), chunk_rows):
        _penalise(logits, rows, penalised[start : start + chunk_rows], counts)
    return logits


def _penalise(logits: torch.Tensor, rows: Sequence[ScheduledRow], indices: list[int], counts: TokenCounts) -> None:
    """Repetition looks at prompt and output, presence and frequency at the output alone."""
    device = logits.device
    chosen = [rows[index] for index in indices]
    outputs, in_prompt = counts.gather(chosen)  # int32 [m, vocab], bool [m, vocab]
    in_output = outputs > 0
    where = ids_to_device(indices, device)  # [m]
    x = logits.index_select(0, where)  # [m, vocab]

    def column(values: list[float]) -> torch.Tensor:
        return to_device(np.array(values, np.float32), device)[:, None]  # [m, 1]

    if any(row.params.repetition_penalty != 1.0 for row in chosen):
        repetition = column([row.params.repetition_penalty for row in chosen])
        seen = in_prompt.logical_or_(in_output)
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
    if any(row.params.frequency_penalty != 0.0 for row in chosen):
        x.addcmul_(outputs.float(), column([row.params.frequency_penalty for row in chosen]), value=-1)
    if any(row.params.presence_penalty != 0.0 for row in chosen):
        x.addcmul_(in_output.float(), column([row.params.presence_penalty for row in chosen]), value=-1)
    logits.index_copy_(0, where, x)
