"""Choosing each row's next token, vectorised over the batch, on the model's device."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from ..scheduler.batch import SampledRow, ScheduledRow, TokenLogprobs
from ..scheduler.sampling_params import SamplingParams
from .logit_edits import LogitEdits
from .logits_processing import process_logits
from .random import GumbelNoise
from .sampler_state import TokenCounts
from .truncation import Truncation, draw_truncated

_CHUNK_ELEMENTS_CPU = 2**18
"""Logits worked on at a time, so that a chunk's noise stays in the cache."""
_CHUNK_ELEMENTS_CUDA = 2**26
_MAXIMUM_BLOCK = 64
_NAN_ROW = -1
"""Stands for "this row's logits are NaN" in the one tensor of ids that crosses to the host; never leaves this file."""


class Sampler:
    """Order of processing, as in vLLM: min_tokens, logit_bias, penalties; then temperature, min_p, top_k, top_p.

    Greedy rows take the arg max of the processed logits; other rows add Gumbel noise keyed by (seed, position, token)
    and take the arg max of that, which samples exactly (Gumbel-max trick), and equally in any batch.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._counts = TokenCounts(vocab_size, device)
        self._edits = LogitEdits(vocab_size, device)
        self._noise = GumbelNoise(vocab_size, device)
        chunk = _CHUNK_ELEMENTS_CPU if device.type == "cpu" else _CHUNK_ELEMENTS_CUDA
        self._chunk_rows = max(1, chunk // vocab_size)

    def drop(self, seq_ids: Collection[str]) -> None:
        """Forget what is kept for sequences that ended."""
        self._counts.drop(seq_ids)
        self._edits.drop(seq_ids)

    def sample(self, logits: torch.Tensor, rows: Sequence[ScheduledRow]) -> list[SampledRow]:
        """logits [n, vocab] in any float dtype, one row each for `rows`; not changed.

        Raises FloatingPointError if any row's logits hold NaN.
        """
        processed = process_logits(logits, rows, self._edits, self._counts, self._chunk_rows)
        drawn = self._draw(processed, rows)  # [n]
        chosen = processed.gather(1, drawn[:, None]).view(-1)  # [n]
        # A NaN wins every arg max and every sort, so the drawn token's logit betrays it.
        host_ids = torch.where(chosen.isnan(), _NAN_ROW, drawn).tolist()
        if _NAN_ROW in host_ids:
            raise FloatingPointError("the model produced NaN logits")
        logprobs = self._logprobs(processed, drawn, rows)
        return [
            SampledRow(row.seq_id, [token], [logprobs[index]] if index in logprobs else None)
            for index, (row, token) in enumerate(zip(rows, host_ids, strict=True))
        ]

    def _draw(self, logits: torch.Tensor, rows: Sequence[ScheduledRow]) -> torch.Tensor:
        """Processed logits [n, vocab] → token ids int64 [n]. Each row goes the shortest way its parameters allow."""
        greedy = [index for index, row in enumerate(rows) if row.params.greedy]
        if len(greedy) == len(rows):
            return first_maximum(logits)
        drawn = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        if greedy:
            where = torch.tensor(greedy, device=self._device)
            drawn[where] = first_maximum(logits.index_select(0, where))
        for truncated in (False, True):
            indices = [
                index
                for index, row in enumerate(rows)
                if not row.params.greedy and _is_truncated(row.params) == truncated
            ]
            for start in range(0, len(indices), self._chunk_rows):
                part = indices[start : start + self._chunk_rows]
                where = torch.tensor(part, device=self._device)
                chosen = [rows[index] for index in part]
                drawn[where] = self._draw_chunk(logits.index_select(0, where), chosen, truncated)
        return drawn

    def _draw_chunk(self, logits: torch.Tensor, rows: Sequence[ScheduledRow], truncated: bool) -> torch.Tensor:
        """A private copy of the rows' processed logits [m, vocab] → token ids [m]."""
        keys = self._noise.row_keys([row.seed for row in rows], [len(row.token_ids) for row in rows])
        temperatures = torch.tensor([row.params.temperature for row in rows], dtype=torch.float32)
        scaled = logits.float().div_(temperatures.to(self._device)[:, None])
        if truncated:
            truncation = Truncation.of([row.params for row in rows], logits.shape[1], self._device)
            return draw_truncated(scaled, truncation, self._noise, keys)
        return first_maximum(scaled.add_(self._noise.all_tokens(keys)))

    def _logprobs(
        self, logits: torch.Tensor, drawn: torch.Tensor, rows: Sequence[ScheduledRow]
    ) -> dict[int, TokenLogprobs]:
        """By row index, for the rows that ask. The drawn token comes first and may stand among the top ones again."""
        wanted = {index: row.params.logprobs for index, row in enumerate(rows) if row.params.logprobs is not None}
        if not wanted:
            return {}
        where = torch.tensor(list(wanted), device=self._device)  # [m]
        log_probabilities = logits.index_select(0, where).float().log_softmax(dim=-1)  # [m, vocab]
        own_ids = drawn.index_select(0, where)[:, None]  # [m, 1]
        own = log_probabilities.gather(1, own_ids)  # [m, 1]
        top, top_ids = log_probabilities.topk(min(max(wanted.values()), logits.shape[1]), dim=-1)  # [m, k]
        ids = torch.cat((own_ids, top_ids), dim=1).tolist()
        values = torch.cat((own, top), dim=1).tolist()
        return {
            index: TokenLogprobs(ids[place][: count + 1], values[place][: count + 1])
            for place, (index, count) in enumerate(wanted.items())
        }


def first_maximum(x: torch.Tensor) -> torch.Tensor:
    """arg max over the last axis, the lowest index on ties and NaN above all: [n, vocab] → int64 [n].

    torch's own is scalar code on a CPU; its amax is not, so the maximum's block is found first.
    """
    num_rows, width = x.shape
    if width % _MAXIMUM_BLOCK != 0:
        return x.argmax(dim=-1)
    blocks = x.reshape(num_rows, -1, _MAXIMUM_BLOCK)
    block = blocks.amax(dim=-1).argmax(dim=-1)  # [n]
    inside = blocks[torch.arange(num_rows, device=x.device), block]  # [n, _MAXIMUM_BLOCK]
    return block * _MAXIMUM_BLOCK + inside.argmax(dim=-1)


def _is_truncated(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
