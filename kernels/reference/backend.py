"""The reference backend: every operator in plain torch, on any device torch has. The oracle of all the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..backend import Activation, AttentionInputs, AttentionSpec, MoeSpec, QKNorms
from ..weights import StoredWeight
from . import attention
from .attention_plan import AttentionPlan, plan_attention, workspace_bytes
from .experts import Experts, load_experts, moe
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

    def logits(self, x: torch.Tensor, head: Any, *, scale: float = 1.0, soft_cap: float = 0.0) -> torch.Tensor:
        product = self.linear(x, head)
        if scale != 1.0:
            product = product * scale
        return product if not soft_cap else torch.tanh(product / soft_cap) * soft_cap

    def pack_embedding(self, table: StoredWeight) -> Any:
        return EmbeddingTable(table.dequantize(self.dtype).to(self.device), self._prepack)

    def embed(self, token_ids: torch.Tensor, table: Any, scale: float = 1.0) -> torch.Tensor:
        rows: torch.Tensor = table.table.index_select(0, token_ids)
        return rows if scale == 1.0 else rows.mul_(torch.tensor(scale, dtype=self.dtype).item())

    def pack_vector(self, weight: StoredWeight, offset: float = 0.0) -> torch.Tensor:
        if offset:
            return weight.dequantize(torch.float32).add_(offset).to(self.device)
        return weight.dequantize(self.dtype).to(self.device)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if weight.dtype is not x.dtype:  # a weight with an offset
            return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = residual.add_(x, alpha=scale)
        return self.rms_norm(residual, weight, eps), residual

    def norm_parts(self, x: torch.Tensor, weights: Sequence[torch.Tensor], eps: float) -> torch.Tensor:
        start = 0
        for weight in weights:
            part = x[:, start : start + weight.shape[0]]
            part.copy_(self.rms_norm(part, weight, eps))
            start += weight.shape[0]
        return x

    def add(self, x: torch.Tensor, residual: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return residual.add_(x, alpha=scale)

    def select_rows(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, indices)

    def gated(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        if activation == "silu":
            return F.silu(gate).mul_(up)
        return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none").mul_(up)

    def pack_experts(self, gate_up: Sequence[Sequence[StoredWeight]], down: Sequence[StoredWeight]) -> Any:
        return load_experts(gate_up, down, self.device, self.dtype, self._prepack)

    def moe(self, x: torch.Tensor, router_logits: torch.Tensor, experts: Experts, spec: MoeSpec) -> torch.Tensor:
        return moe(x, router_logits, experts, spec, self.gated)

    def plan_attention(self, inputs: AttentionInputs, spec: AttentionSpec, block_size: int) -> AttentionPlan:
        return plan_attention(inputs, spec, block_size, self.dtype)

    def attention_workspace_bytes(
        self, spec: AttentionSpec, block_size: int, max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int
    ) -> int:
        return workspace_bytes(spec, block_size, max_num_batched_tokens, max_model_len, self.dtype, self.device)

    def rope_and_write_kv(
        self,
        qkv: torch.Tensor,
        rope_table: torch.Tensor,
        kv_layer: torch.Tensor,
        plan: AttentionPlan,
        spec: AttentionSpec,
        norms: QKNorms | None = None,
    ) -> torch.Tensor:
        if norms is not None:
            heads = qkv.view(qkv.shape[0], -1, spec.head_dim)
            for part, weight in (
                (heads[:, : spec.num_heads], norms.q),
                (heads[:, spec.num_heads : spec.num_heads + spec.num_kv_heads], norms.k),
            ):
                part.copy_(self.rms_norm(part, weight, norms.eps))
        return attention.rope_and_write_kv(qkv, rope_table, kv_layer, plan, spec)

    def attention(
        self, q: torch.Tensor, kv_layer: torch.Tensor, plan: AttentionPlan, spec: AttentionSpec
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
