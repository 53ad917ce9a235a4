"""The reference backend: every operator in plain torch, on any device torch has. The oracle of all the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..backend import AttentionInputs, AttentionSpec
from ..weights import StoredWeight
from . import attention
from .linear import EmbeddingTable, can_prepack, load_linear

_MAX_COPY_BYTES = 2**26
"""Copied blocks are held for as many layers at a time as this allows, and for at least one."""


class ReferenceBackend:
    """Implements `KernelBackend`; see there for what each operator means. Holds no state but its settings."""

    name = "reference"
    detail = ""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._prepack = can_prepack(device, dtype)

    def weight_bytes(self, weights: Iterable[tuple[str, tuple[int, ...]]]) -> int:
        return sum(math.prod(shape) for _, shape in weights) * self.dtype.itemsize

    def pack_linear(self, parts: Sequence[StoredWeight], bias: Sequence[StoredWeight] = ()) -> Any:
        return load_linear(parts, bias, self.device, self.dtype, self._prepack)

    def linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        product: torch.Tensor = weight.head(x) if isinstance(weight, EmbeddingTable) else weight(x)
        return product

    def logits(self, x: torch.Tensor, head: Any) -> torch.Tensor:
        return self.linear(x, head)

    def pack_embedding(self, table: StoredWeight) -> Any:
        return EmbeddingTable(table.dequantize(self.dtype).to(self.device), self._prepack)

    def embed(self, token_ids: torch.Tensor, table: Any) -> torch.Tensor:
        rows: torch.Tensor = table.table.index_select(0, token_ids)
        return rows

    def pack_vector(self, weight: StoredWeight) -> torch.Tensor:
        return weight.dequantize(self.dtype).to(self.device)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = residual.add_(x)
        return self.rms_norm(residual, weight, eps), residual

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual.add_(x)

    def select_rows(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, indices)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        half = gate_up.shape[-1] // 2
        return F.silu(gate_up[..., :half]).mul_(gate_up[..., half:])

    def plan_attention(self, inputs: AttentionInputs, spec: AttentionSpec, block_size: int) -> attention.AttentionPlan:
        return attention.plan(inputs, spec, block_size, self.dtype)

    def attention_workspace_bytes(
        self, spec: AttentionSpec, block_size: int, max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int
    ) -> int:
        return attention.workspace_bytes(
            spec, block_size, max_num_batched_tokens, max_model_len, self.dtype, self.device
        )

    def rope_and_write_kv(
        self,
        qkv: torch.Tensor,
        rope_table: torch.Tensor,
        kv_layer: torch.Tensor,
        plan: attention.AttentionPlan,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        return attention.rope_and_write_kv(qkv, rope_table, kv_layer, plan, spec)

    def attention(
        self, q: torch.Tensor, kv_layer: torch.Tensor, plan: attention.AttentionPlan, spec: AttentionSpec
    ) -> torch.Tensor:
        return attention.attend(q, kv_layer, plan, spec)

    def copy_blocks(self, pool: torch.Tensor, sources: Sequence[int], targets: Sequence[int]) -> None:
        source_ids = torch.tensor(sources, dtype=torch.int64, device=pool.device)  # [num_copies]
        target_ids = torch.tensor(targets, dtype=torch.int64, device=pool.device)  # [num_copies]
        # A block may be source of one copy and target of another: within a layer, all reads come before any write.
        bytes_per_layer = len(sources) * pool[0, 0].nbytes
        step = max(1, _MAX_COPY_BYTES // max(1, bytes_per_layer))
        for start in range(0, pool.shape[0], step):
            layers = pool[start : start + step]
            layers.index_copy_(1, target_ids, layers.index_select(1, source_ids))
