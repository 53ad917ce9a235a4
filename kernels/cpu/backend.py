"""The CPU's backend: every operator in native code, weights as quantised as their file has them.

Operators run one by one, or all of a step in one call once `record` has seen a step. The results are the same, and so
are those of a row in any company: see native/octavo_cpu.h.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..backend import Activation, AttentionInputs, AttentionSpec, DrawParameters, MoeSpec, QKNorms, StepFunction
from ..weights import StoredWeight
from .library import (
    Attention,
    Group,
    NativeContext,
    Op,
    OpKind,
    Step,
    attention_workspace,
    copy_blocks,
    supported_isas,
    supports_attention,
)
from .packing import PackedExperts, PackedMatrix, pack_matrix, packed_bytes
from .program import LOGITS, CpuPlan, GroupStandIn, RecordedStep, Recorder, Unrecordable, draw_of

logger = logging.getLogger("octavo.kernels")

_ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
"""OvActivation."""


@dataclass(slots=True, frozen=True)
class CpuLinear:
    matrix: PackedMatrix
    bias: torch.Tensor | None  # fp32 [num_outputs]


class CpuBackend:
    """Implements `KernelBackend`, `DrawingBackend` and `RecordingBackend`. Its layout of K/V inside a block is its own.

    Not for several threads at once. The native threads start at the first use.
    """

    name = "cpu"

    def __init__(self, device: torch.device, dtype: torch.dtype, num_threads: int) -> None:
        """`dtype` is float32, or bfloat16: then rows are rounded to 8 bits for products with quantised weights
        (native/linear_integer_impl.h)."""
        self.device = device
        self.dtype = dtype
        self._num_threads = num_threads
        isa = os.environ.get("OCTAVO_CPU_ISA") or supported_isas()[-1]
        self.detail = f"{isa}, {num_threads} thread{'s' if num_threads > 1 else ''}"
        self._recorder: Recorder | None = None
        self._specs: dict[tuple[Any, ...], Attention] = {}

    @cached_property
    def _context(self) -> NativeContext:
        return NativeContext(self.dtype, self._num_threads)

    # ------------------------------------------------------------------ weights

    def weight_bytes(self, weights: Iterable[tuple[str, tuple[int, ...]]]) -> int:
        return sum(packed_bytes(encoding, shape, self.dtype) for encoding, shape in weights)

    def pack_linear(self, parts: Sequence[StoredWeight], bias: Sequence[StoredWeight] = ()) -> CpuLinear:
        joined = torch.cat([part.dequantize(torch.float32) for part in bias]) if bias else None
        return CpuLinear(pack_matrix(parts, self._context), joined)

    def pack_embedding(self, table: StoredWeight) -> CpuLinear:
        return self.pack_linear([table])

    def pack_vector(self, weight: StoredWeight, offset: float = 0.0) -> torch.Tensor:
        return weight.dequantize(torch.float32).add_(offset)

    def pack_experts(self, gate_up: Sequence[Sequence[StoredWeight]], down: Sequence[StoredWeight]) -> PackedExperts:
        return PackedExperts(
            [pack_matrix(parts, self._context) for parts in gate_up],
            [pack_matrix([part], self._context) for part in down],
        )

    # ------------------------------------------------------------------ running or noting an operator

    def _empty(self, like: torch.Tensor, width: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[rows of `like`, width]"""
        dtype = dtype or self.dtype
        if self._recorder is not None:
            return self._recorder.empty(self._recorder.domain(like), width, dtype)
        return torch.empty((like.shape[0], width), dtype=dtype)

    def _do(self, kind: OpKind, like: torch.Tensor, step: Step | None = None, **fields: Any) -> None:
        """Run an operator over as many rows as `like` has, or note it.

        A tensor among `fields` gives a pointer and a stride. `step`: what the operator reads besides its fields; a
        recording brings its own.
        """
        op = Op(kind=kind)
        for name, value in fields.items():
            if isinstance(value, torch.Tensor):
                setattr(op, name, value.data_ptr())
                if name != "weight":
                    setattr(op, f"stride_{name}", value.stride(0))
            elif isinstance(value, tuple):
                getattr(op, name)[: len(value)] = value
            elif value is not None:
                setattr(op, name, value)
        if self._recorder is not None:
            op.rows = self._recorder.domain(like)
            self._recorder.ops.append(op)
        else:
            self._context.run([op], step or Step(num_tokens=like.shape[0]))

    # ------------------------------------------------------------------ operators

    def linear(self, x: torch.Tensor, weight: CpuLinear) -> torch.Tensor:
        return self._multiply(x, weight, self.dtype)

    def logits(self, x: torch.Tensor, head: CpuLinear, *, scale: float = 1.0, soft_cap: float = 0.0) -> torch.Tensor:
        out = self._multiply(x, head, torch.float32)
        if scale != 1.0 or soft_cap:
            self._do(OpKind.CAP, x, a=out, out=out, n=(out.shape[-1],), f=(scale, soft_cap))
        return out

    def _multiply(self, x: torch.Tensor, weight: CpuLinear, dtype: torch.dtype) -> torch.Tensor:
        out = self._empty(x, weight.matrix.num_outputs, dtype)
        bias = None if weight.bias is None else weight.bias.data_ptr()
        in_fp32 = int(dtype is torch.float32)
        self._do(OpKind.LINEAR, x, a=x, b=bias, out=out, weight=weight.matrix.pointer.value, n=(in_fp32,))
        return out

    def embed(self, token_ids: torch.Tensor, table: CpuLinear, scale: float = 1.0) -> torch.Tensor:
        if self._recorder is not None and token_ids is not self._recorder.token_ids:
            raise Unrecordable("an embedding of other tokens than the step's")
        width = table.matrix.num_inputs
        out = self._empty(token_ids, width)
        step = Step(num_tokens=token_ids.shape[0], token_ids=token_ids.data_ptr())
        factor = torch.tensor(scale, dtype=self.dtype).item()
        self._do(OpKind.EMBED, token_ids, step, out=out, weight=table.matrix.pointer.value, n=(width,), f=(factor,))
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        width = x.shape[-1]
        out = self._empty(x, width)
        self._do(OpKind.RMS_NORM, x, a=x, out=out, weight=weight, n=(width, 1), f=(eps,))
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        width = x.shape[-1]
        out = self._empty(x, width)
        fields: dict[str, Any] = {"a": x, "b": residual, "out": out, "out2": residual, "weight": weight}
        self._do(OpKind.ADD_RMS_NORM, x, **fields, n=(width, 1), f=(eps, scale))
        return out, residual

    def norm_parts(self, x: torch.Tensor, weights: Sequence[torch.Tensor], eps: float) -> torch.Tensor:
        start, stride = x.data_ptr(), x.stride(0)
        for weight in weights:
            width = weight.shape[0]
            part: dict[str, Any] = {"a": start, "out": start, "stride_a": stride, "stride_out": stride}
            self._do(OpKind.RMS_NORM, x, **part, weight=weight, n=(width, 1), f=(eps,))
            start += width * self.dtype.itemsize
        return x

    def add(self, x: torch.Tensor, residual: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        self._do(OpKind.ADD, x, a=x, b=residual, out=residual, n=(x.shape[-1],), f=(scale,))
        return residual

    def select_rows(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        if self._recorder is not None and indices is not self._recorder.logits_indices:
            raise Unrecordable("a choice of other rows than those that draw")
        out = self._empty(indices, x.shape[-1])
        step = Step(num_logits=indices.shape[0], logits_indices=indices.data_ptr())
        self._do(OpKind.SELECT_ROWS, indices, step, rows=LOGITS, a=x, out=out, n=(x.shape[-1],))
        return out

    def gated(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        width = gate_up.shape[-1] // 2
        out = self._empty(gate_up, width)
        self._do(OpKind.GATED, gate_up, a=gate_up, out=out, n=(width, _ACTIVATIONS[activation]))
        return out

    def moe(self, x: torch.Tensor, router_logits: torch.Tensor, experts: PackedExperts, spec: MoeSpec) -> torch.Tensor:
        if not 0 < spec.num_experts_per_token <= spec.num_experts == experts.num_experts:
            chosen, among = spec.num_experts_per_token, spec.num_experts
            raise ValueError(f"{chosen} of {among} experts cannot be chosen where {experts.num_experts} are packed")
        out = self._empty(x, experts.hidden_size)
        how = (spec.num_experts_per_token, _ACTIVATIONS[spec.activation], int(spec.renormalize))
        self._do(OpKind.MOE, x, a=x, b=router_logits, out=out, weight=experts.address, n=how)
        return out

    # ------------------------------------------------------------------ attention

    def plan_attention(self, inputs: AttentionInputs, spec: AttentionSpec, block_size: int) -> CpuPlan:
        group = Group(
            slots=inputs.slots.data_ptr(),
            block_tables=inputs.block_tables.data_ptr(),
            table_stride=inputs.block_tables.stride(0),
        )
        step = Step(
            num_tokens=inputs.positions.shape[0],
            num_rows=inputs.num_rows,
            num_decode_rows=inputs.num_decode_rows,
            positions=inputs.positions.data_ptr(),
            query_starts=inputs.query_starts.data_ptr(),
            kv_lens=inputs.kv_lens.data_ptr(),
            groups=ctypes.pointer(group),
        )
        return CpuPlan(step, group, inputs)

    def _shape(self, spec: AttentionSpec, block_size: int, norms: QKNorms | None = None) -> Attention:
        """Native code's form of a layer's shape, which lives as long as the backend. Raises ValueError for one that it
        has no code for."""
        weights = None if norms is None else (norms.q.data_ptr(), norms.k.data_ptr(), norms.eps)
        key = (spec, block_size, weights)
        if key not in self._specs:
            shape = Attention(
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                block_size=block_size,
                window=spec.window,
                scale=spec.scale,
                soft_cap=spec.soft_cap,
            )
            if not supports_attention(shape):
                raise ValueError(f"the cpu backend has no attention for {spec} in blocks of {block_size}")
            if weights is not None:
                shape.q_norm, shape.k_norm, shape.norm_eps = weights
            self._specs[key] = shape
        return self._specs[key]

    def rope_and_write_kv(
        self,
        qkv: torch.Tensor,
        rope_table: torch.Tensor,
        kv_layer: torch.Tensor,
        plan: CpuPlan | GroupStandIn,
        spec: AttentionSpec,
        norms: QKNorms | None = None,
    ) -> torch.Tensor:
        q = self._empty(qkv, spec.num_heads * spec.head_dim)
        shape = ctypes.pointer(self._shape(spec, kv_layer.shape[3], norms))
        step, group = _rows_of(plan)
        fields = {"a": qkv, "out": q, "out2": kv_layer, "weight": rope_table, "spec": shape}
        self._do(OpKind.ROPE_WRITE, qkv, step, **fields, n=(rope_table.shape[1], group))
        return q

    def attention(
        self, q: torch.Tensor, kv_layer: torch.Tensor, plan: CpuPlan | GroupStandIn, spec: AttentionSpec
    ) -> torch.Tensor:
        out = self._empty(q, spec.num_heads * spec.head_dim)
        shape = ctypes.pointer(self._shape(spec, kv_layer.shape[3]))
        step, group = _rows_of(plan)
        self._do(OpKind.ATTENTION, q, step, a=q, out=out, out2=kv_layer, spec=shape, n=(0, group))
        return out

    def attention_workspace_bytes(
        self, spec: AttentionSpec, block_size: int, max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int
    ) -> int:
        q_bytes = max_num_batched_tokens * spec.num_heads * spec.head_dim * self.dtype.itemsize
        return q_bytes + attention_workspace(self._shape(spec, block_size), max_model_len, self._num_threads)

    def copy_blocks(self, pool: torch.Tensor, sources: Sequence[int], targets: Sequence[int]) -> None:
        copy_blocks(pool, sources, targets)

    # ------------------------------------------------------------------ drawing

    def draw(self, logits: torch.Tensor, parameters: DrawParameters, positions: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        ids = torch.empty(logits.shape[0], dtype=torch.int64)
        wanted = draw_of(parameters, positions.data_ptr())
        self._do(OpKind.DRAW, logits, a=logits, out=ids, weight=ctypes.addressof(wanted), n=(logits.shape[1],))
        return ids

    # ------------------------------------------------------------------ whole steps

    def record(
        self, compute: StepFunction, *, max_num_tokens: int, max_num_logits: int, num_groups: int
    ) -> RecordedStep | None:
        recorder = self._recorder = Recorder(max_num_tokens, max_num_logits, num_groups)
        try:
            with recorder:
                logits = compute(recorder.token_ids, recorder.plans, recorder.logits_indices)
        except Unrecordable as error:
            logger.info("steps are not recorded: %s", error)
            return None
        finally:
            self._recorder = None
        return RecordedStep(self._context, recorder, logits)


def _rows_of(plan: CpuPlan | GroupStandIn) -> tuple[Step | None, int]:
    """The step that an operator reads at once, and which of its groups."""
    return (None, plan.index) if isinstance(plan, GroupStandIn) else (plan.step, 0)
