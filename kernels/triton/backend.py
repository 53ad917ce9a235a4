"""The GPU's backend: attention, norms, activations and quantised products in Triton, dense products by the vendor's
library."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..backend import Activation, AttentionInputs, AttentionSpec, DecodeInputs, DrawParameters, MoeSpec, QKNorms
from ..reference.backend import ReferenceBackend
from ..weights import StoredWeight
from .decode import DecodeConfig, DecodeWorkspace, list_chunks, max_splits, paged_decode
from .elementwise import add_rms_norm, gated, rms_norm
from .moe import DenseExperts, moe
from .prefill import paged_prefill, prefill_tiles
from .quantized import SCRATCH_BYTES, DenseScratch, QuantizedEmbedding, QuantizedLinear
from .quantized_layout import form_of, packed_bytes
from .rope import rope_write
from .sampling import draw
from .tuning import decode_config, prefill_config


@dataclass(slots=True, frozen=True)
class TritonPlan:
    """What all attention layers of one step share."""

    num_decode_rows: int
    positions: torch.Tensor  # integers [num_tokens]
    slots: torch.Tensor  # integers [num_tokens]
    block_tables: torch.Tensor  # int32 [num_rows, max_blocks]
    kv_lens: torch.Tensor  # int32 [num_rows]
    workspace: DecodeWorkspace | None
    """With the chunks of all decode rows listed; None without decode rows."""
    query_starts: torch.Tensor | None  # int32 [num_rows + 1]; None without prefill rows
    tile_rows: torch.Tensor | None  # int32 [num_tiles]; None without prefill rows
    tile_firsts: torch.Tensor | None  # int32 [num_tiles]


class TritonBackend(ReferenceBackend):
    """Implements `KernelBackend`; dense products, look-up and copies are those of plain torch, which calls the same
    libraries as anybody would. Matrices of a quantised file stay as they are. Compiles each kernel at its first use."""

    name = "triton"

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        # Without a GPU the kernels run under Triton's interpreter or not at all: any entry of the table will do.
        has_gpu = device.type == "cuda" and torch.cuda.is_available()
        self._capability = torch.cuda.get_device_capability(device) if has_gpu else (8, 0)
        self._scratch: DenseScratch | None = None
        """Made with the first quantised matrix: most models have none, and who only plans has no memory for it."""

    def pack_linear(self, parts: Sequence[StoredWeight], bias: Sequence[StoredWeight] = ()) -> Any:
        if all(form_of(part.encoding) is None for part in parts):
            return super().pack_linear(parts, bias)
        return QuantizedLinear(parts, bias, self.device, self.dtype, self._shared_scratch())

    def linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        return weight.head(x) if isinstance(weight, QuantizedEmbedding) else super().linear(x, weight)

    def pack_embedding(self, table: StoredWeight) -> Any:
        if form_of(table.encoding) is None:
            return super().pack_embedding(table)
        return QuantizedEmbedding(table, self.device, self.dtype, self._shared_scratch())

    def embed(self, token_ids: torch.Tensor, table: Any, scale: float = 1.0) -> torch.Tensor:
        if not isinstance(table, QuantizedEmbedding):
            return super().embed(token_ids, table, scale)
        rows = table.embed(token_ids)
        return rows if scale == 1.0 else rows.mul_(torch.tensor(scale, dtype=self.dtype).item())

    def pack_experts(self, gate_up: Sequence[Sequence[StoredWeight]], down: Sequence[StoredWeight]) -> DenseExperts:
        """In the working dtype, whatever the file has."""
        (wide, hidden), inner = (sum(part.shape[0] for part in gate_up[0]), gate_up[0][0].shape[1]), down[0].shape[1]
        packed = DenseExperts(
            torch.empty((len(gate_up), wide, hidden), dtype=self.dtype, device=self.device),
            torch.empty((len(down), hidden, inner), dtype=self.dtype, device=self.device),
        )
        for expert, (parts, narrow) in enumerate(zip(gate_up, down, strict=True)):
            packed.gate_up[expert] = torch.cat([part.dequantize(self.dtype) for part in parts])
            packed.down[expert] = narrow.dequantize(self.dtype)
        return packed

    def moe(self, x: torch.Tensor, router_logits: torch.Tensor, experts: Any, spec: MoeSpec) -> torch.Tensor:
        return moe(x, router_logits, experts, spec)

    def weight_bytes(self, weights: Iterable[tuple[str, tuple[int, ...]]]) -> int:
        return sum(
            packed_bytes(encoding, shape)
            if len(shape) == 2 and form_of(encoding) is not None
            else math.prod(shape) * self.dtype.itemsize
            for encoding, shape in weights
        )

    def _shared_scratch(self) -> DenseScratch:
        if self._scratch is None:
            self._scratch = DenseScratch(self.device)
        return self._scratch

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = x if scale == 1.0 else x * scale
        return add_rms_norm(x, residual, weight, eps), residual

    def gated(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        return gated(gate_up, activation)

    def plan_attention(self, inputs: AttentionInputs, spec: AttentionSpec, block_size: int) -> TritonPlan:  # type: ignore[override]
        num_decode = inputs.num_decode_rows
        kv_lens = inputs.kv_lens.to(torch.int32)
        workspace = None
        if num_decode:
            max_kv_len = max(inputs.context_lens[:num_decode])
            workspace = self.decode_workspace(spec, block_size, num_decode, max_kv_len)
            list_chunks(kv_lens[:num_decode], workspace, spec, self._decode_config(spec, block_size))
        tile_rows = tile_firsts = None
        if num_decode < inputs.num_rows:
            prefill = prefill_config(spec, block_size, self.dtype, self._capability)
            tiles = prefill_tiles(inputs.query_lens, num_decode, spec, prefill)
            tile_rows, tile_firsts = self._upload(np.stack((tiles.rows, tiles.firsts)))
        return TritonPlan(
            num_decode_rows=num_decode,
            positions=inputs.positions,
            slots=inputs.slots,
            block_tables=inputs.block_tables.to(torch.int32),
            kv_lens=kv_lens,
            workspace=workspace,
            query_starts=inputs.query_starts.to(torch.int32),
            tile_rows=tile_rows,
            tile_firsts=tile_firsts,
        )

    def decode_workspace(
        self, spec: AttentionSpec, block_size: int, max_num_rows: int, max_kv_len: int
    ) -> DecodeWorkspace:
        splits = max_splits(max_kv_len, spec.window, self._decode_config(spec, block_size).chunk)
        return DecodeWorkspace.allocate(max_num_rows, splits, spec, self.device)

    def plan_decode(self, inputs: DecodeInputs, spec: AttentionSpec, block_size: int) -> TritonPlan:
        config = self._decode_config(spec, block_size)
        workspace = inputs.workspace.shaped(max_splits(inputs.max_kv_len, spec.window, config.chunk))
        list_chunks(inputs.kv_lens, workspace, spec, config)
        return TritonPlan(
            num_decode_rows=inputs.kv_lens.shape[0],
            positions=inputs.positions,
            slots=inputs.slots,
            block_tables=inputs.block_tables,
            kv_lens=inputs.kv_lens,
            workspace=workspace,
            query_starts=None,
            tile_rows=None,
            tile_firsts=None,
        )

    def draw(self, logits: torch.Tensor, parameters: DrawParameters, positions: torch.Tensor) -> torch.Tensor:
        return draw(logits, parameters, positions, truncated=True)

    def _decode_config(self, spec: AttentionSpec, block_size: int) -> DecodeConfig:
        return decode_config(spec, block_size, self.dtype, self._capability)

    def _upload(self, array: npt.NDArray[np.int32]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        # Only from pinned memory does the copy run beside the host's work.
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def attention_workspace_bytes(
        self, spec: AttentionSpec, block_size: int, max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int
    ) -> int:
        splits = max_splits(max_model_len, spec.window, self._decode_config(spec, block_size).chunk)
        # One for steps as they come, one that captured steps share.
        num_rows = 2 * min(max_num_seqs, max_num_batched_tokens)
        partials = num_rows * spec.num_heads * splits * (spec.head_dim + 1) * 4 if splits > 1 else 0
        partials += num_rows * (splits * 8 + 4)  # the list of chunks
        partials += SCRATCH_BYTES  # for the products of quantised weights, should there be any
        return partials + max_num_batched_tokens * spec.num_heads * spec.head_dim * self.dtype.itemsize

    def rope_and_write_kv(  # type: ignore[override]
        self,
        qkv: torch.Tensor,
        rope_table: torch.Tensor,
        kv_layer: torch.Tensor,
        plan: TritonPlan,
        spec: AttentionSpec,
        norms: QKNorms | None = None,
    ) -> torch.Tensor:
        heads = None if norms is None else (norms.q, norms.k, norms.eps)
        return rope_write(qkv, rope_table, plan.positions, plan.slots, kv_layer, spec, heads)

    def attention(  # type: ignore[override]
        self, q: torch.Tensor, kv_layer: torch.Tensor, plan: TritonPlan, spec: AttentionSpec
    ) -> torch.Tensor:
        num_decode, block_size = plan.num_decode_rows, kv_layer.shape[3]
        out = torch.empty((q.shape[0], spec.num_heads * spec.head_dim), dtype=q.dtype, device=q.device)
        if plan.workspace is not None:
            config = self._decode_config(spec, block_size)
            paged_decode(
                q[:num_decode], kv_layer, plan.block_tables, plan.kv_lens, out, plan.workspace, spec, config,
                listed=True
            )  # fmt: skip
        if plan.tile_rows is not None and plan.tile_firsts is not None and plan.query_starts is not None:
            paged_prefill(
                q, kv_layer, plan.block_tables, plan.kv_lens, plan.query_starts, plan.tile_rows, plan.tile_firsts, out,
                spec, prefill_config(spec, block_size, self.dtype, self._capability)
            )  # fmt: skip
        return out
