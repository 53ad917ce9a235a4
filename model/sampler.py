"""Choosing each row's next token, vectorised over the batch, on the model's device."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch

from ..kernels.backend import DrawingBackend, DrawParameters
from ..scheduler.batch import ScheduledRow
from ..scheduler.sampling_params import SamplingParams
from .device import ids_to_device, to_device
from .drawn import NAN_ROW, Drawn, TopLogprobs
from .logit_edits import LogitEdits
from .logits_processing import process_logits
from .random import GumbelNoise
from .sampler_state import TokenCounts
from .truncation import Truncation, draw_truncated

_CHUNK_ELEMENTS_CPU = 2**18
"""Logits worked on at a time, so that a chunk's noise stays in the cache."""
_CHUNK_ELEMENTS_CUDA = 2**26
_MAXIMUM_BLOCK = 64


class Sampler:
    """Order of processing, as in vLLM: min_tokens, logit_bias, penalties; then temperature, min_p, top_k, top_p.

    Greedy rows take the arg max of the processed logits; other rows add Gumbel noise keyed by (seed, position, token)
    and take the arg max of that, which samples exactly (Gumbel-max trick), and equally in any batch.
    """

    def __init__(self, vocab_size: int, device: torch.device, drawing_backend: DrawingBackend | None = None) -> None:
        """`drawing_backend` draws instead of torch."""
        self._device = device
        self._drawing_backend = drawing_backend
        self._counts = TokenCounts(vocab_size, device)
        self._edits = LogitEdits(vocab_size, device)
        self._noise = GumbelNoise(vocab_size, device)
        chunk = _CHUNK_ELEMENTS_CPU if device.type == "cpu" else _CHUNK_ELEMENTS_CUDA
        self._chunk_rows = max(1, chunk // vocab_size)
        self._last: tuple[list[tuple[SamplingParams, int]], DrawParameters] | None = None
        """What the last step's rows asked for. Sequences come and go, but most steps have those of the step before."""

    def drop(self, seq_ids: Collection[str]) -> None:
        """Forget what is kept for sequences that ended."""
        self._counts.drop(seq_ids)
        self._edits.drop(seq_ids)

    def sample(self, logits: torch.Tensor, rows: Sequence[ScheduledRow]) -> Drawn:
        """logits [n, vocab] in any float dtype, one row each for `rows`; not changed."""
        processed = process_logits(logits, rows, self._edits, self._counts, self._chunk_rows)
        drawn = self._draw(processed, rows)  # [n]
        penalised = [index for index, row in enumerate(rows) if row.params.has_penalties]
        if penalised and self._drawing_backend is not None:
            # Counted here and now: the next step may be launched before the host knows these tokens.
            where = ids_to_device(penalised, self._device)
            self._counts.add_drawn([rows[index] for index in penalised], drawn.index_select(0, where))
        return Drawn.start([row.seq_id for row in rows], drawn, self._logprobs(processed, drawn, rows))

    def start(self, drawn: torch.Tensor, rows: Sequence[ScheduledRow]) -> Drawn:
        """For tokens that a captured step has drawn: int64 [n], overwritten by the next one."""
        return Drawn.start([row.seq_id for row in rows], drawn, None)

    def asks_for_more(self, row: ScheduledRow) -> bool:
        """Whether a row needs more than drawing from its logits as they are."""
        params = row.params
        return (
            params.has_penalties
            or bool(params.logit_bias)
            or params.logprobs is not None
            or row.num_output_tokens < params.min_tokens
        )

    def _draw(self, processed: torch.Tensor, rows: Sequence[ScheduledRow]) -> torch.Tensor:
        """Processed logits [n, vocab] → token ids int64 [n], -1 for a row with a NaN."""
        if self._drawing_backend is not None:
            positions = ids_to_device([row.num_tokens for row in rows], self._device)
            return self._drawing_backend.draw(processed, self.parameters(rows), positions)
        drawn = self._draw_in_torch(processed, rows)
        chosen = processed.gather(1, drawn[:, None]).view(-1)  # [n]
        # A NaN wins every arg max and every sort, so the drawn token's logit betrays it.
        return torch.where(chosen.isnan(), NAN_ROW, drawn)

    def parameters(self, rows: Sequence[ScheduledRow]) -> DrawParameters:
        """What the rows ask for; the same object as long as it is the same."""
        wishes = [(row.params, row.seed) for row in rows]
        if self._last is None or wishes != self._last[0]:
            self._last = wishes, self._parameters_of(wishes)
        return self._last[1]

    def _parameters_of(self, wishes: Sequence[tuple[SamplingParams, int]]) -> DrawParameters:
        params = [params for params, _ in wishes]
        floats = np.array([(p.temperature, p.top_p, p.min_p) for p in params], np.float32).T
        seeds = np.array([seed & 2**64 - 1 for _, seed in wishes], np.uint64).view(np.int64)
        temperatures, top_ps, min_ps = to_device(np.ascontiguousarray(floats), self._device)
        seed_bits, top_ks = to_device(np.stack((seeds, np.array([p.top_k for p in params]))), self._device)
        return DrawParameters(temperatures, top_ks.to(torch.int32), top_ps, min_ps, seed_bits)

    def _draw_in_torch(self, logits: torch.Tensor, rows: Sequence[ScheduledRow]) -> torch.Tensor:
        """Each row goes the shortest way its parameters allow."""
        greedy = [index for index, row in enumerate(rows) if row.params.greedy]
        if len(greedy) == len(rows):
            return first_maximum(logits)
        drawn = torch.empty(len(rows), dtype=torch.int64, device=self._device)
        if greedy:
            where = ids_to_device(greedy, self._device)
            drawn[where] = first_maximum(logits.index_select(0, where))
        for truncated in (False, True):
            indices = [
                index
                for index, row in enumerate(rows)
                if not row.params.greedy and _is_truncated(row.params) == truncated
            ]
            for start in range(0, len(indices), self._chunk_rows):
                part = indices[start : start + self._chunk_rows]
                where = ids_to_device(part, self._device)
                chosen = [rows[index] for index in part]
                drawn[where] = self._draw_chunk(logits.index_select(0, where), chosen, truncated)
        return drawn

    def _draw_chunk(self, logits: torch.Tensor, rows: Sequence[ScheduledRow], truncated: bool) -> torch.Tensor:
        """A private copy of the rows' processed logits [m, vocab] → token ids [m]."""
        keys = self._noise.row_keys([row.seed for row in rows], [row.num_tokens for row in rows])
        temperatures = torch.tensor([row.params.temperature for row in rows], dtype=torch.float32)
        scaled = logits.float().div_(temperatures.to(self._device)[:, None])
        if truncated:
            truncation = Truncation.of([row.params for row in rows], logits.shape[1], self._device)
            return draw_truncated(scaled, truncation, self._noise, keys)
        return first_maximum(scaled.add_(self._noise.all_tokens(keys)))

    def _logprobs(self, logits: torch.Tensor, drawn: torch.Tensor, rows: Sequence[ScheduledRow]) -> TopLogprobs | None:
        """For the rows that ask. The drawn token comes first and may stand among the top ones again."""
        wanted = {index: row.params.logprobs for index, row in enumerate(rows) if row.params.logprobs is not None}
        if not wanted:
            return None
        where = ids_to_device(list(wanted), self._device)  # [m]
        log_probabilities = logits.index_select(0, where).float().log_softmax(dim=-1)  # [m, vocab]
        own_ids = drawn.index_select(0, where)[:, None]  # [m, 1]
        own = log_probabilities.gather(1, own_ids.clamp(min=0))  # [m, 1]
        top, top_ids = log_probabilities.topk(min(max(wanted.values()), logits.shape[1]), dim=-1)  # [m, k]
        return TopLogprobs(wanted, torch.cat((own_ids, top_ids), dim=1), torch.cat((own, top), dim=1))


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
