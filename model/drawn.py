"""Drawn tokens on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from msgspec import structs

from ..scheduler.batch import SampledRow, TokenLogprobs

NAN_ROW = -1
"""Stands for "this row's logits are NaN" among drawn ids."""


@dataclass(slots=True, frozen=True)
class TopLogprobs:
    """Log probabilities of the rows that ask for them: their drawn token, then the most probable ones."""

    wanted: Mapping[int, int]
    """Row → how many of the most probable. [m]"""
    token_ids: torch.Tensor  # int64 [m, 1 + k]
    values: torch.Tensor  # fp32 [m, 1 + k]


@dataclass(slots=True)
class Drawn:
    """The tokens of a step's drawing rows. On a GPU their copy to the host runs beside what is launched next."""

    seq_ids: Sequence[str]
    ids: torch.Tensor  # int64 [n], on the device, NAN_ROW for a row whose logits hold a NaN
    _host_ids: torch.Tensor
    _logprobs: TopLogprobs | None

    @classmethod
    def start(cls, seq_ids: Sequence[str], ids: torch.Tensor, logprobs: TopLogprobs | None) -> Drawn:
        """Begin the copy. `ids` may be overwritten by work that is queued later."""
        if ids.device.type != "cuda":
            return cls(seq_ids, ids, ids.clone(), logprobs)
        host_ids = _to_pinned(ids)
        if logprobs is not None:
            logprobs = TopLogprobs(logprobs.wanted, _to_pinned(logprobs.token_ids), _to_pinned(logprobs.values))
        return cls(seq_ids, ids, host_ids, logprobs)

    def with_logprobs_of(self, part: Drawn, indices: Sequence[int]) -> Drawn:
        """This step with the log probabilities of rows `indices`, which were drawn as a batch of their own."""
        if (found := part._logprobs) is not None:
            wanted = {indices[row]: count for row, count in found.wanted.items()}
            self._logprobs = TopLogprobs(wanted, found.token_ids, found.values)
        return self

    def rows(self) -> list[SampledRow]:
        """Call when the step has ended. Raises FloatingPointError if any row's logits held NaN."""
        rows = sampled_rows(self.seq_ids, self._host_ids.tolist())
        if self._logprobs is not None:
            for index, logprobs in _by_row(self._logprobs).items():
                rows[index] = structs.replace(rows[index], logprobs=[logprobs])
        return rows


def sampled_rows(seq_ids: Sequence[str], tokens: Sequence[int]) -> list[SampledRow]:
    """Raises FloatingPointError if any of the tokens is NAN_ROW."""
    if NAN_ROW in tokens:
        raise FloatingPointError("the model produced NaN logits")
    return list(map(SampledRow, seq_ids, [[token] for token in tokens]))


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _by_row(logprobs: TopLogprobs) -> dict[int, TokenLogprobs]:
    ids, values = logprobs.token_ids.tolist(), logprobs.values.tolist()
    return {
        index: TokenLogprobs(ids[place][: count + 1], values[place][: count + 1])
        for place, (index, count) in enumerate(logprobs.wanted.items())
    }
