"""Random K/V in paged pools for bench/gpu.py, and attention over it in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from gpu_measure import Setting
from octavo.kernels.backend import AttentionSpec

_FILL_VALUES = 2**28


@dataclass(frozen=True, slots=True)
class Shape:
    """One attention layer of a model that people serve."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    soft_cap: float = 0.0

    @property
    def spec(self) -> AttentionSpec:
        scale = self.head_dim**-0.5
        return AttentionSpec(self.num_heads, self.num_kv_heads, self.head_dim, scale, self.window, self.soft_cap)

    def token_bytes(self, dtype: torch.dtype) -> int:
        """K and V of one token."""
        return 2 * self.num_kv_heads * self.head_dim * dtype.itemsize


@dataclass(frozen=True)
class Paged:
    """One launch's inputs. Rows of (queries, context); their blocks lie scattered over one layer of a pool."""

    spec: AttentionSpec
    query_lens: Sequence[int]
    context_lens: Sequence[int]
    q: torch.Tensor  # [num_tokens, num_heads, head_dim], a view of a merged projection
    layer: torch.Tensor  # [num_blocks, 2, num_kv_heads, block_size, head_dim]
    block_tables: torch.Tensor  # int32 [num_rows, max_blocks]
    kv_lens: torch.Tensor  # int32 [num_rows]
    query_starts: torch.Tensor  # int32 [num_rows + 1]
    out: torch.Tensor  # [num_tokens, num_heads * head_dim], NaN until it is written

    @cached_property
    def starts(self) -> list[int]:
        return [int(start) for start in self.query_starts.tolist()]

    def keys_and_values(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a row's whole context, each [num_kv_heads, length, head_dim]."""
        length, size = self.context_lens[row], self.layer.shape[3]
        blocks = self.layer[self.block_tables[row, : -(-length // size)].long()]
        keys, values = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
        return keys, values

    def expected(self, row: int, queries: Sequence[int]) -> torch.Tensor:
        """Attention of some of a row's queries, in fp64. [len(queries), num_heads * head_dim]"""
        spec = self.spec
        keys, values = self.keys_and_values(row)
        results = []
        for query in queries:
            stop = self.context_lens[row] - self.query_lens[row] + query + 1
            start = max(0, stop - spec.window) if spec.window else 0
            q = self.q[self.starts[row] + query].double().view(spec.num_kv_heads, -1, spec.head_dim)
            scores = q @ keys[:, start:stop].double().transpose(1, 2) * spec.scale  # [num_kv_heads, group, L]
            if spec.soft_cap:
                scores = spec.soft_cap * (scores / spec.soft_cap).tanh()
            results.append((scores.softmax(-1) @ values[:, start:stop].double()).flatten())
        return torch.stack(results)

    def read_bytes(self) -> int:
        """K/V that some query sees, counted once, with q and the output."""
        tokens = 0
        for queries, context in zip(self.query_lens, self.context_lens, strict=True):
            window = self.spec.window
            tokens += min(context, queries + window - 1) if window else context
        kv = tokens * 2 * self.spec.num_kv_heads * self.spec.head_dim * self.layer.element_size()
        return kv + 2 * self.out.nbytes

    def num_pairs(self) -> int:
        """Of a query and a key that it sees."""
        total = 0
        for queries, context in zip(self.query_lens, self.context_lens, strict=True):
            first = context - queries + 1  # keys that the first query may see
            if self.spec.window and first >= self.spec.window:
                total += queries * self.spec.window
            elif self.spec.window and context > self.spec.window:
                growing = self.spec.window - first
                total += growing * (first + self.spec.window - 1) // 2 + (queries - growing) * self.spec.window
            else:
                total += queries * (first + context) // 2
        return total


class NoisePool:
    """One large piece of noise that every shape sees as a layer of its own: filling memory anew for each would take
    most of the time."""

    def __init__(self, setting: Setting, num_bytes: int) -> None:
        self._setting = setting
        self._generator = setting.generator(1)
        self._values = torch.empty(num_bytes // setting.dtype.itemsize, dtype=setting.dtype, device=setting.device)
        for start in range(0, len(self._values), _FILL_VALUES):
            self._values[start : start + _FILL_VALUES].normal_(generator=self._generator)

    def layer(self, shape: Shape, block_size: int) -> torch.Tensor:
        per_block = 2 * shape.num_kv_heads * block_size * shape.head_dim
        count = len(self._values) // per_block
        return self._values[: count * per_block].view(count, 2, shape.num_kv_heads, block_size, shape.head_dim)

    def launches(
        self, shape: Shape, query_lens: Sequence[int], context_lens: Sequence[int], block_size: int
    ) -> list[Paged]:
        """Sets of inputs that share no block, enough of them for a timing, or as many as there are blocks for; none
        where not even one fits."""
        layer = self.layer(shape, block_size)
        needed = sum(-(-context // block_size) for context in context_lens)
        wanted = self._setting.num_sets(needed * block_size * shape.token_bytes(self._setting.dtype))
        count = min(wanted, (len(layer) - 1) // needed)
        order = torch.randperm(len(layer) - 1, device=layer.device, generator=self._generator).to(torch.int32) + 1
        return [
            make_launch(
                shape.spec, query_lens, context_lens, layer, order[i * needed : (i + 1) * needed], self._generator
            )
            for i in range(count)
        ]


def make_launch(
    spec: AttentionSpec,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    layer: torch.Tensor,
    block_ids: torch.Tensor,
    generator: torch.Generator,
) -> Paged:
    """Random queries over what lies in the layer; rows take `block_ids`, int32, one after the other."""
    device, block_size = layer.device, layer.shape[3]
    counts = [-(-context // block_size) for context in context_lens]
    tables = torch.zeros((len(counts), max(counts)), dtype=torch.int32, device=device)
    taken = 0
    for row, count in enumerate(counts):
        tables[row, :count] = block_ids[taken : taken + count]
        taken += count
    starts = [0]
    for queries in query_lens:
        starts.append(starts[-1] + queries)
    heads = spec.num_heads + 2 * spec.num_kv_heads
    merged = torch.empty((starts[-1], heads, spec.head_dim), dtype=layer.dtype, device=device)
    merged.normal_(generator=generator)
    shape = (starts[-1], spec.num_heads * spec.head_dim)
    return Paged(
        spec,
        query_lens,
        context_lens,
        merged[:, : spec.num_heads],
        layer,
        tables,
        torch.tensor(list(context_lens), dtype=torch.int32, device=device),
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.full(shape, math.nan, dtype=layer.dtype, device=device),
    )


def poisoned_launch(
    spec: AttentionSpec,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Paged:
    """In a pool of its own, NaN wherever no query of the row that owns the block may look."""
    device = generator.device
    num_blocks = sum(-(-context // block_size) for context in context_lens) + 1
    layer = torch.empty((num_blocks, 2, spec.num_kv_heads, block_size, spec.head_dim), dtype=dtype, device=device)
    layer.normal_(generator=generator)
    layer[0] = math.nan
    order = torch.randperm(num_blocks - 1, device=device, generator=generator).to(torch.int32) + 1
    launch = make_launch(spec, query_lens, context_lens, layer, order, generator)
    for row, (queries, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        blocks = launch.block_tables[row, : -(-context // block_size)].long()
        positions = torch.arange(len(blocks) * block_size, device=device).view(-1, 1, 1, block_size, 1)
        first = max(0, context - queries - spec.window + 1) if spec.window else 0
        layer[blocks] = layer[blocks].masked_fill((positions < first) | (positions >= context), math.nan)
    return launch
