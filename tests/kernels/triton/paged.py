"""Random paged K/V for the tests of this folder, and attention over it written out in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from octavo.kernels.backend import AttentionSpec


@dataclass
class Paged:
    """Rows of (queries, context); their K/V lie in random blocks of one layer, and NaN everywhere else."""

    spec: AttentionSpec
    query_lens: Sequence[int]
    context_lens: Sequence[int]
    block_size: int
    dtype: torch.dtype
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        spec, size = self.spec, self.block_size
        counts = [-(-context // size) for context in self.context_lens]
        order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
        # Padding of tables points nowhere that may be read: to a block of NaN.
        self.block_tables = torch.zeros(len(counts), max(1, *counts) + 1, dtype=torch.int32)
        shape = (sum(counts) + 1, 2, spec.num_kv_heads, size, spec.head_dim)
        self.layer = torch.full(shape, math.nan, dtype=self.dtype)
        for row, (queries, context) in enumerate(zip(self.query_lens, self.context_lens, strict=True)):
            for index in range(counts[row]):
                self.block_tables[row, index] = order.pop()
            # What the window has left may belong to another sequence by now.
            first = max(0, context - queries - spec.window + 1) if spec.window else 0
            for position in range(first, context):
                kv = torch.randn(2, spec.num_kv_heads, spec.head_dim, generator=generator)
                self.layer[self.block_tables[row, position // size], :, :, position % size] = kv.to(self.dtype)
        self.kv_lens = torch.tensor(list(self.context_lens), dtype=torch.int32)
        starts = [0]
        for queries in self.query_lens:
            starts.append(starts[-1] + queries)
        self.query_starts = torch.tensor(starts, dtype=torch.int32)
        # q as it lies in a merged projection: heads of k and v stand between the tokens.
        merged = torch.randn(starts[-1], spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim, generator=generator)
        self.q = merged.to(self.dtype)[:, : spec.num_heads]

    def expected(self) -> torch.Tensor:
        """float64 [num_tokens, num_heads * head_dim], one query and head after another."""
        spec, group = self.spec, self.spec.num_heads // self.spec.num_kv_heads
        out = []
        for row, (queries, context) in enumerate(zip(self.query_lens, self.context_lens, strict=True)):
            blocks = self.layer[self.block_tables[row].long()].double()
            keys, values = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)  # each [num_kv_heads, length, head_dim]
            for index in range(queries):
                stop = context - queries + index + 1
                start = max(0, stop - spec.window) if spec.window else 0
                query = self.q[int(self.query_starts[row]) + index].double()
                heads = []
                for head in range(spec.num_heads):
                    scores = keys[head // group, start:stop] @ query[head] * spec.scale
                    if spec.soft_cap:
                        scores = spec.soft_cap * (scores / spec.soft_cap).tanh()
                    heads.append(scores.softmax(-1) @ values[head // group, start:stop])
                out.append(torch.cat(heads))
        return torch.stack(out) if out else torch.empty(0, spec.num_heads * spec.head_dim, dtype=torch.float64)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found - expected‖ / ‖expected‖; NaN where anything is."""
    return float((found.double() - expected).norm() / expected.norm())


TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3}
