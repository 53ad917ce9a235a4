"""Sampling from a truncated distribution: min_p, then top_k, then top_p.

The vocabulary is sorted in full only for rows whose kept tokens are not provably among the most probable few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..scheduler.sampling_params import SamplingParams
from .random import GumbelNoise

CANDIDATE_COUNTS = (256, 4096)
"""Tokens looked at first, and next where those do not suffice."""


@dataclass(slots=True)
class Truncation:
    """Parameters of n rows as columns."""

    top_k: torch.Tensor  # int64 [n, 1], vocab where off
    top_p: torch.Tensor  # fp32 [n, 1]
    log_min_p: torch.Tensor  # fp32 [n, 1], -inf where off

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> Truncation:
        top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
        min_p = torch.tensor([p.min_p for p in params], dtype=torch.float32)
        return cls(
            top_k=torch.tensor(top_k).to(device)[:, None],
            top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32).to(device)[:, None],
            log_min_p=min_p.log().to(device)[:, None],
        )

    def rows(self, index: torch.Tensor) -> Truncation:
        return Truncation(self.top_k[index], self.top_p[index], self.log_min_p[index])


def draw_truncated(
    logits: torch.Tensor, truncation: Truncation, noise: GumbelNoise, keys: torch.Tensor
) -> torch.Tensor:
    """logits fp32 [n, vocab] after temperature, keys int32 [n, 2] → drawn token ids int64 [n].

    Rows of NaN logits come back with the id of a NaN.
    """
    num_rows, vocab_size = logits.shape
    drawn = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    rest = torch.arange(num_rows, device=logits.device)  # rows not drawn yet
    for count in (*(count for count in CANDIDATE_COUNTS if count < vocab_size), vocab_size):
        token_ids, proven = _draw_among(logits[rest], truncation.rows(rest), noise, keys[rest], count)
        drawn[rest] = token_ids
        rest = rest[~proven]
        if not rest.numel():
            break
    return drawn


def _draw_among(
    logits: torch.Tensor, truncation: Truncation, noise: GumbelNoise, keys: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from the `count` most probable tokens: ids [n], and whether each row's kept tokens are among them [n]."""
    values, token_ids = logits.topk(count, dim=-1)  # each [n, count], descending
    complete = count == logits.shape[1]
    kept = values >= values[:, :1] + truncation.log_min_p  # [n, count]
    kept &= torch.arange(count, device=logits.device) < truncation.top_k
    # Where min_p or top_k cut within the candidates, what they keep is all the mass there is.
    bounded = torch.ones_like(kept[:, :1]) if complete else ~kept[:, -1:]  # [n, 1]
    whole = logits.logsumexp(dim=-1, keepdim=True)  # [n, 1]
    masked = values.masked_fill(~kept, float("-inf"))
    log_mass = torch.where(bounded, masked.logsumexp(dim=-1, keepdim=True), whole)  # [n, 1]
    probabilities = (masked - log_mass).exp_()  # [n, count]
    cumulative = probabilities.cumsum(dim=-1)
    # A token stays while the more probable ones fall short of top_p; with top_p 1 rounding must not cut anything.
    kept &= (cumulative - probabilities < truncation.top_p) | (truncation.top_p >= 1)
    kept[:, 0] = True
    unlimited = (truncation.top_k >= logits.shape[1]) & truncation.log_min_p.isneginf()
    proven = bounded | (unlimited & (cumulative[:, -1:] >= truncation.top_p) & (truncation.top_p < 1))
    scores = values + noise.for_tokens(keys, token_ids)
    best = scores.masked_fill_(~kept, float("-inf")).argmax(dim=-1, keepdim=True)  # [n, 1]
    # A row of NaN proves nothing, but a second look would not help it.
    proven = proven | values[:, :1].isnan()
    return token_ids.gather(1, best).view(-1), proven.view(-1)
