"""Recording what operators a step runs, so that one native call can run them all.

As a CUDA graph is captured: the step's function is called once with stand-ins as long as any step may be, every
operator that it calls is noted instead of run, and its outputs are placed in memory that is reused as soon as nobody
holds them any more. What is noted does not depend on the number of rows, so one recording serves every step.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.overrides import TorchFunctionMode

from ..backend import AttentionInputs, DecodeRows, DrawParameters
from .library import Draw, Group, NativeContext, Op, OpKind, Step

TOKENS, LOGITS = 0, 1
"""OvRows: whether an operator has a row for each token or for each row that draws."""


_HARMLESS = frozenset(
    {
        torch.Tensor.data_ptr,
        torch.Tensor.dim,
        torch.Tensor.numel,
        torch.Tensor.size,
        torch.Tensor.stride,
        torch.Tensor.shape.__get__,  # type: ignore[attr-defined]
        torch.Tensor.dtype.__get__,  # type: ignore[attr-defined]
        torch.Tensor.device.__get__,
    }
)
"""What looks at a tensor without reading it."""


@dataclass(slots=True, frozen=True)
class CpuPlan:
    """The rows of a step as native code reads them, for the layers of one group."""

    step: Step
    """With `group` as its only group."""
    group: Group
    inputs: AttentionInputs
    """Keeps the memory that both point to."""


@dataclass(slots=True, frozen=True)
class GroupStandIn:
    """In place of a group's plan while a step is recorded."""

    index: int


class Unrecordable(Exception):
    """The step does something that is no operator of this backend."""


class Recorder(TorchFunctionMode):
    """Notes operators while it is entered. Touching a stand-in by torch raises Unrecordable: that would happen once,
    and never again."""

    def __init__(self, max_num_tokens: int, max_num_logits: int, num_groups: int) -> None:
        super().__init__()
        self._num_rows = (max_num_tokens, max_num_logits)
        self.ops: list[Op] = []
        self.memory: list[torch.Tensor] = []
        """Every buffer; the recorded pointers lead into them."""
        self._free: list[torch.Tensor] = []
        self._domains: dict[int, int] = {}
        """Address of a live stand-in → TOKENS or LOGITS."""
        self.plans = tuple(GroupStandIn(index) for index in range(num_groups))
        self.token_ids = torch.empty(max_num_tokens, dtype=torch.int64)
        self.logits_indices = torch.empty(max_num_logits, dtype=torch.int64)
        self._watch(self.token_ids, TOKENS)
        self._watch(self.logits_indices, LOGITS)

    def domain(self, tensor: torch.Tensor) -> int:
        """Whose rows a stand-in has. Raises Unrecordable for another tensor."""
        try:
            return self._domains[tensor.data_ptr()]
        except KeyError:
            raise Unrecordable("an operator reads a tensor that no operator has made") from None

    def empty(self, domain: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """A stand-in [rows of the domain, width]; its memory is free again when it is."""
        num_bytes = self._num_rows[domain] * width * dtype.itemsize
        fitting = [buffer for buffer in self._free if buffer.nbytes >= num_bytes]
        if fitting:
            buffer = min(fitting, key=lambda buffer: buffer.nbytes)
            self._free = [other for other in self._free if other is not buffer]
        else:
            buffer = torch.empty(max(1, num_bytes), dtype=torch.uint8)
            self.memory.append(buffer)
        tensor = buffer[:num_bytes].view(dtype).view(self._num_rows[domain], width)
        self._watch(tensor, domain)
        weakref.finalize(tensor, self._release, tensor.data_ptr(), buffer).atexit = False
        return tensor

    def _watch(self, tensor: torch.Tensor, domain: int) -> None:
        self._domains[tensor.data_ptr()] = domain

    def _release(self, address: int, buffer: torch.Tensor) -> None:
        self._domains.pop(address, None)
        self._free.append(buffer)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _HARMLESS:
            for value in (*args, *(kwargs or {}).values()):
                if isinstance(value, torch.Tensor) and value.data_ptr() in self._domains:
                    raise Unrecordable(f"{getattr(func, '__name__', func)} is no operator of this backend")
        return func(*args, **(kwargs or {}))


def draw_of(parameters: DrawParameters, positions: int) -> Draw:
    """Native code's form of what rows ask for; the tensors must outlive it. `positions`: the address of theirs."""
    return Draw(
        temperatures=parameters.temperatures.data_ptr(),
        top_ks=parameters.top_ks.data_ptr(),
        top_ps=parameters.top_ps.data_ptr(),
        min_ps=parameters.min_ps.data_ptr(),
        seeds=parameters.seeds.data_ptr(),
        positions=positions,
    )


class RecordedStep:
    """A step as a list of operators; implements `RecordedSteps`."""

    def __init__(self, context: NativeContext, recorder: Recorder, logits: torch.Tensor) -> None:
        self._context = context
        self._decode = DecodeProgram(context, recorder, logits)
        self._ops = (Op * len(recorder.ops))(*recorder.ops)
        self._memory = recorder.memory
        self._logits = logits  # [max_num_logits, vocab]
        self._max_num_tokens = recorder.token_ids.shape[0]
        self._num_groups = len(recorder.plans)

    @property
    def memory_bytes(self) -> int:
        """Of all intermediate results."""
        return sum(buffer.nbytes for buffer in self._memory)

    def __call__(self, token_ids: torch.Tensor, plans: Sequence[CpuPlan], logits_indices: torch.Tensor) -> torch.Tensor:
        """Raises ValueError for a step of more rows, or of other groups, than was recorded for."""
        num_tokens, num_logits = token_ids.shape[0], logits_indices.shape[0]
        if num_tokens > self._max_num_tokens or num_logits > self._logits.shape[0]:
            raise ValueError(f"a step of {num_tokens} tokens and {num_logits} draws is larger than what was recorded")
        if len(plans) != self._num_groups:
            raise ValueError(f"plans for {len(plans)} groups of layers; the step was recorded with {self._num_groups}")
        # Rows are common to all groups, so any plan has them.
        step = Step.from_buffer_copy(plans[0].step)
        step.groups = (Group * len(plans))(*(plan.group for plan in plans))
        step.num_tokens, step.token_ids = num_tokens, token_ids.data_ptr()
        step.num_logits, step.logits_indices = num_logits, logits_indices.data_ptr()
        self._context.run(self._ops, step)
        return self._logits[:num_logits]

    def start_decode(self, rows: DecodeRows, parameters: DrawParameters) -> None:
        """Raises ValueError for more rows than was recorded for."""
        self._decode.start(rows, parameters)

    def finish_decode(self) -> list[int]:
        return self._decode.finish()


class DecodeProgram:
    """The operators of a step of decodes and its draw as one list, over numbers that stay where they are: between two
    steps the caches hold little but weights, so that every operation of the host costs more than it seems to."""

    def __init__(self, context: NativeContext, recorder: Recorder, logits: torch.Tensor) -> None:
        self._context = context
        self._max_rows = min(recorder.token_ids.shape[0], logits.shape[0])
        num_groups = len(recorder.plans)
        # Token, position, K/V length; then slots and table rows, a line for each group.
        self._numbers = np.zeros((3 + 2 * num_groups, self._max_rows), np.int64)
        self._counting = np.arange(self._max_rows + 1)
        self._drawn = np.zeros(self._max_rows, np.int64)
        lines = [line.ctypes.data for line in self._numbers]
        self._tables: list[npt.NDArray[np.int64] | None] = [None] * num_groups
        self._groups = (Group * num_groups)()
        for group, slots, table_rows in zip(self._groups, lines[3::2], lines[4::2], strict=True):
            group.slots, group.table_rows = slots, table_rows
        self._step = Step(
            token_ids=lines[0],
            positions=lines[1],
            kv_lens=lines[2],
            query_starts=self._counting.ctypes.data,
            logits_indices=self._counting.ctypes.data,
            groups=self._groups,
        )
        self._parameters: DrawParameters | None = None
        self._wanted = Draw()
        draw = Op(kind=OpKind.DRAW, rows=LOGITS, a=logits.data_ptr(), stride_a=logits.stride(0))
        draw.out, draw.n[0] = self._drawn.ctypes.data, logits.shape[1]
        self._ops = (Op * (len(recorder.ops) + 1))(*recorder.ops, draw)

    def start(self, rows: DecodeRows, parameters: DrawParameters) -> None:
        count = len(rows.token_ids)
        if count > self._max_rows:
            raise ValueError(f"a step of {count} decodes is larger than what was recorded")
        self._context.settle()  # before its numbers are overwritten
        lines = [rows.token_ids, rows.positions, [position + 1 for position in rows.positions]]
        for slots, table_rows in zip(rows.slots, rows.table_rows, strict=True):
            lines += slots, table_rows
        self._numbers[:, :count] = lines
        for index, tables in enumerate(rows.block_tables):
            if tables is not self._tables[index]:
                self._tables[index] = tables
                self._groups[index].block_tables = tables.ctypes.data
                self._groups[index].table_stride = tables.shape[1]
        if parameters is not self._parameters:
            # The token to draw stands where the K/V of those before it end.
            self._parameters, self._wanted = parameters, draw_of(parameters, self._step.kv_lens)
            self._ops[-1].weight = ctypes.addressof(self._wanted)
        step = self._step
        step.num_tokens = step.num_logits = step.num_rows = step.num_decode_rows = count
        self._context.start(self._ops, step)

    def finish(self) -> list[int]:
        self._context.finish()
        drawn: list[int] = self._drawn[: self._step.num_tokens].tolist()
        return drawn
