"""Products with weights that stay quantised: codes become numbers in registers, on their way to the matrix unit.

At few rows a product costs what reading its matrix costs, and 4.5 bits per weight are a quarter of 16. Against that
stands unpacking: seven instructions per weight of Q4_0 or Q8_0, nine of Q4_K or Q6_K, eleven of Q2_K, product and all
(counted in the machine code for sm_90, at 16 rows). How much of the gain is left is for a GPU to say.
quantized_layout.py has the layout and the encodings.

    grid (tile of rows, tile of outputs, split)     a program: the products of one tile over one range of the inputs

    x      [rows, inputs]      |-- split 0 --|-- split 1 --|     each split leaves fp32 sums, which a second kernel adds
    W^T    [inputs, outputs]                                     in order; with one split the first writes the output

How many splits a matrix has follows from its shape alone, and a row of x is multiplied in the same order in every tile
of rows. So up to `MAX_QUANTIZED_ROWS` a row's result does not depend on how many others come with it. There is no path
of its own for a single row: multiplying element by element saves a fifth of the instructions at most, and Triton would
not load ahead for it.

Beyond that many rows arithmetic is the limit, not memory: weights are then made dense, a piece at a time, for
torch's own product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

import triton
import triton.language as tl

from ..weights import StoredWeight
from .quantized_layout import OUTPUT_MULTIPLE, UNIT_VALUES, PackedMatrix, form_of, pack

MAX_QUANTIZED_ROWS = 64
"""Rows of x up to which weights are multiplied as they are stored."""
_WANTED_PROGRAMS = 512
"""Programs that keep a large GPU's memory busy: four on each of its multiprocessors."""
_MIN_SPLIT_VALUES = 1024
"""Inputs of a split; with fewer, writing and reading partial sums would rival reading the weights."""
SCRATCH_BYTES = 2**26
"""Of a `DenseScratch`, unless told otherwise: pieces large enough that torch's product runs at its speed."""
_DENSE_TILE_ROWS = 32
_SUM_TILE = 512


@dataclass(frozen=True, slots=True)
class MatmulConfig:
    """What a sweep has found for a form."""

    outputs: int = 64
    """Of a program: a power of two from 16 to OUTPUT_MULTIPLE. Splits are counted with it, so it is part of the
    arithmetic: another value may round differently."""
    max_rows: int = 32
    """Of a program: 16 or 32. Further rows are further programs, which find the weights in the second cache."""
    num_warps: int = 4
    num_stages: int = 4
    max_registers: int | None = 128
    """Of a thread. Where this is None the assembler aims at more resident programs than shared memory holds, and may
    spill for them."""


_CONFIG = MatmulConfig()
_FP32_CONFIG = MatmulConfig(max_rows=16, num_stages=3, max_registers=None)
"""Twice the bytes and three products for one: what fits registers and shared memory."""


@triton.jit
def _codes(words, PLANE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr):
    """The codes of one group, less their zero point, in fp32; exact.

    An integer below 2**23 in the low bits of the float 2**23 adds itself to it, so that a mask and a subtraction
    convert it; and it may stand some bits further up, as long as all is within those 23.
    """
    FIRST: tl.constexpr = BITS * PLANE
    SHIFT: tl.constexpr = FIRST if FIRST + BITS <= 23 else 0
    if SHIFT != FIRST:
        words = words >> FIRST
    BIASED_ZERO: tl.constexpr = 8388608.0 / (1 << SHIFT) + ZERO
    biased = (words & (((1 << BITS) - 1) << SHIFT)) | 0x4B000000
    return biased.to(tl.float32, bitcast=True) * (1.0 / (1 << SHIFT)) - BIASED_ZERO


@triton.jit
def _unit(units_ptr, block, padded, outputs, BLOCK: tl.constexpr, UNIT_VALUES: tl.constexpr):
    """What multiplies the scales or offsets of a block, for each of `outputs`; 1 where they stand alone."""
    unit = 1.0
    if units_ptr is not None:
        unit = tl.load(units_ptr + (block * BLOCK // UNIT_VALUES) * padded + outputs).to(tl.float32)
    return unit


@triton.jit
def _group_weights(words, scales_ptr, offsets_ptr, scale_unit, offset_unit, block, padded, outputs,
                   PLANE: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr):  # fmt: skip
    """fp32 [outputs, group]: the weights of group PLANE of a block whose words are [outputs, group].

    Products of code, scale and unit have at most 23 bits: they are exact, in any order and fused or not, and a weight
    is rounded once, where its offset is added.
    """
    steps = (block * (32 // BITS) + PLANE) * padded + outputs
    scale = tl.load(scales_ptr + steps).to(tl.float32) * scale_unit
    weights = _codes(words, PLANE, BITS, ZERO) * scale[:, None]
    if offsets_ptr is not None:
        offset = tl.load(offsets_ptr + steps).to(tl.float32) * offset_unit
        weights += offset[:, None]
    return weights


@triton.jit(do_not_specialize=["num_rows"])
def matmul_kernel(x_ptr, words_ptr, scales_ptr, offsets_ptr, scale_units_ptr, offset_units_ptr, bias_ptr, out_ptr,
                  num_rows, num_outputs, width, padded, num_blocks, blocks_per_split, x_stride, words_stride,
                  out_stride, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, UNIT_VALUES: tl.constexpr,
                  ROWS: tl.constexpr, OUTPUTS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """ROWS x OUTPUTS products over one split of the inputs, into out [splits, num_rows, num_outputs]."""
    GROUPS: tl.constexpr = 32 // BITS
    BLOCK: tl.constexpr = GROUPS * GROUP
    # Programs start in the order of the first axis: those of the same weights together.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(2)
    inner = tl.arange(0, GROUP)
    words_ptrs = words_ptr + outputs.to(tl.int64)[:, None] * words_stride + inner[None, :]  # [N, G]
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * x_stride + inner[None, :]  # [M, G]
    acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    start = split * blocks_per_split
    for block in range(start, tl.minimum(start + blocks_per_split, num_blocks)):
        words = tl.load(words_ptrs + block * GROUP)
        scale_unit = _unit(scale_units_ptr, block, padded, outputs, BLOCK, UNIT_VALUES)
        offset_unit = _unit(offset_units_ptr, block, padded, outputs, BLOCK, UNIT_VALUES)
        for plane in tl.static_range(GROUPS):
            first = block * BLOCK + plane * GROUP
            # The last block may have groups beyond the width, whose weights are 0; x ends with a whole group.
            x = tl.load(x_ptrs + first, mask=rows[:, None] < tl.where(first < width, num_rows, 0), other=0.0)
            weights = _group_weights(words, scales_ptr, offsets_ptr, scale_unit, offset_unit, block, padded, outputs,
                                     plane, BITS, ZERO)  # fmt: skip
            acc = tl.dot(x, tl.trans(weights.to(x.dtype)), acc, input_precision=PRECISION)
    real = (rows[:, None] < num_rows) & (outputs[None, :] < num_outputs)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + outputs, mask=outputs < num_outputs, other=0.0).to(tl.float32)[None, :]
    places = (split.to(tl.int64) * num_rows + rows)[:, None] * out_stride + outputs[None, :]
    tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def sum_kernel(partial_ptr, bias_ptr, out_ptr, num_outputs, out_stride, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """out = partial sums of all splits, in their order, plus bias; for one tile of one row."""
    row = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = outputs < num_outputs
    total = tl.zeros([TILE], tl.float32)
    for split in tl.static_range(SPLITS):
        place = split * tl.num_programs(0) + row
        total += tl.load(partial_ptr + place * num_outputs + outputs, mask=real, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + outputs, mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + outputs, total.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["num_rows", "first_row"])
def dense_kernel(ids_ptr, words_ptr, scales_ptr, offsets_ptr, scale_units_ptr, offset_units_ptr, out_ptr, num_rows,
                 first_row, width, padded, words_stride, BITS: tl.constexpr, GROUP: tl.constexpr,
                 ZERO: tl.constexpr, UNIT_VALUES: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """One block of ROWS rows of the matrix into out [num_rows, width]: those that ids name, or those from first_row."""
    BLOCK: tl.constexpr = 32 // BITS * GROUP
    targets = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    inner = tl.arange(0, GROUP)
    outputs = first_row + targets
    if ids_ptr is not None:
        outputs = tl.load(ids_ptr + targets, mask=targets < num_rows, other=0)
    # What is beyond the last row reads row 0 and is never stored.
    outputs = tl.where(targets < num_rows, outputs, 0).to(tl.int64)
    words = tl.load(words_ptr + outputs[:, None] * words_stride + block * GROUP + inner[None, :])  # [M, G]
    scale_unit = _unit(scale_units_ptr, block, padded, outputs, BLOCK, UNIT_VALUES)
    offset_unit = _unit(offset_units_ptr, block, padded, outputs, BLOCK, UNIT_VALUES)
    out_ptrs = out_ptr + targets.to(tl.int64)[:, None] * width + inner[None, :]
    for plane in tl.static_range(32 // BITS):
        weights = _group_weights(words, scales_ptr, offsets_ptr, scale_unit, offset_unit, block, padded, outputs,
                                 plane, BITS, ZERO)  # fmt: skip
        first = block * BLOCK + plane * GROUP
        real = targets[:, None] < tl.where(first < width, num_rows, 0)
        tl.store(out_ptrs + first, weights.to(out_ptr.dtype.element_ty), mask=real)


def matmul_config(dtype: torch.dtype) -> MatmulConfig:
    """For x of that dtype."""
    return _FP32_CONFIG if dtype is torch.float32 else _CONFIG


def num_splits(matrix: PackedMatrix, config: MatmulConfig) -> int:
    """Ranges of inputs that are multiplied apart: enough to fill a GPU, none of them empty. By shape alone."""
    wanted = triton.cdiv(_WANTED_PROGRAMS, triton.cdiv(matrix.num_outputs, config.outputs))
    limit = max(1, matrix.width // _MIN_SPLIT_VALUES)
    per_split = triton.cdiv(matrix.num_blocks, min(wanted, limit))
    return int(triton.cdiv(matrix.num_blocks, per_split))


def quantized_matmul(
    x: torch.Tensor, matrix: PackedMatrix, bias: torch.Tensor | None, out: torch.Tensor, config: MatmulConfig
) -> None:
    """out = x @ matrix^T + bias, with fp32 sums of weights rounded to x's dtype.

    x fp32, fp16 or bf16 [num_rows, width], its last axis contiguous; bias [num_outputs]; out of x's dtype [num_rows,
    num_outputs], its last axis contiguous.
    """
    num_rows, splits = x.shape[0], num_splits(matrix, config)
    tile_rows = 16 if num_rows <= 16 else config.max_rows
    target = out
    if splits > 1:
        target = torch.empty((splits, num_rows, matrix.num_outputs), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(num_rows, tile_rows), triton.cdiv(matrix.num_outputs, config.outputs), splits)
    matmul_kernel[grid](
        x, *_tensors(matrix), bias if splits == 1 else None, target, num_rows, matrix.num_outputs, matrix.width,
        matrix.scales.shape[1], matrix.num_blocks, triton.cdiv(matrix.num_blocks, splits), x.stride(0),
        matrix.words.stride(0), target.stride(-2), **_form_constants(matrix),
        ROWS=tile_rows, OUTPUTS=config.outputs,
        # fp32 as three products of tf32, which keeps all but the last bits; outside the matrix unit it takes minutes to
        # compile. Other dtypes take no notice.
        PRECISION="tf32x3", num_warps=config.num_warps, num_stages=config.num_stages,
        maxnreg=config.max_registers)  # fmt: skip
    if splits > 1:
        sum_kernel[(num_rows, triton.cdiv(matrix.num_outputs, _SUM_TILE))](
            target, bias, out, matrix.num_outputs, out.stride(0), SPLITS=splits, TILE=_SUM_TILE,
            num_warps=4)  # fmt: skip


def dequantize_rows(matrix: PackedMatrix, first_row: int, out: torch.Tensor) -> None:
    """Rows [first_row, first_row + out.shape[0]) of the matrix into out [num_rows, width], contiguous, rounded once."""
    _launch_dense(matrix, None, first_row, out)


def look_up_rows(matrix: PackedMatrix, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows that `ids`, integers [num_ids] below num_outputs, name → [num_ids, width]."""
    out = torch.empty((ids.shape[0], matrix.width), dtype=dtype, device=ids.device)
    _launch_dense(matrix, ids, 0, out)
    return out


def _launch_dense(matrix: PackedMatrix, ids: torch.Tensor | None, first_row: int, out: torch.Tensor) -> None:
    num_rows = out.shape[0]
    if num_rows == 0:
        return
    dense_kernel[(triton.cdiv(num_rows, _DENSE_TILE_ROWS), matrix.num_blocks)](
        ids, *_tensors(matrix), out, num_rows, first_row, matrix.width, matrix.scales.shape[1],
        matrix.words.stride(0), **_form_constants(matrix), ROWS=_DENSE_TILE_ROWS, num_warps=4)  # fmt: skip


def _tensors(matrix: PackedMatrix) -> tuple[torch.Tensor | None, ...]:
    return matrix.words, matrix.scales, matrix.offsets, matrix.scale_units, matrix.offset_units


def _form_constants(matrix: PackedMatrix) -> dict[str, int]:
    form = matrix.form
    return {"BITS": form.bits, "GROUP": form.group, "ZERO": form.zero, "UNIT_VALUES": UNIT_VALUES}


class DenseScratch:
    """Memory for weights that are made dense for one product; one for all layers, whose products follow each other."""

    def __init__(self, device: torch.device, num_bytes: int = SCRATCH_BYTES) -> None:
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def max_rows(self, width: int, dtype: torch.dtype) -> int:
        """Rows that fit. Raises ValueError if not one does."""
        rows = self._bytes.numel() // (width * dtype.itemsize)
        if rows == 0:
            raise ValueError(f"a row of {width} x {dtype} does not fit a scratch of {self._bytes.numel()} bytes")
        # Whole tiles of torch's product.
        return rows // OUTPUT_MULTIPLE * OUTPUT_MULTIPLE or rows

    def matrix(self, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """[num_rows, width], holding whatever it last held."""
        num_bytes = num_rows * width * dtype.itemsize
        return self._bytes[:num_bytes].view(dtype).view(num_rows, width)


class QuantizedLinear:
    """Matrices that share their input, kept quantised; those of encodings without a form are kept dense.

    Neighbours of one form are one matrix, hence one launch; a merged projection whose parts differ takes several.
    """

    def __init__(
        self,
        parts: Sequence[StoredWeight],
        bias: Sequence[StoredWeight],
        device: torch.device,
        dtype: torch.dtype,
        scratch: DenseScratch,
    ) -> None:
        """Outputs come in the order of `parts`; raises ValueError if their inputs differ, or if `scratch` does not hold
        a row."""
        width = parts[0].shape[-1]
        if any(len(part.shape) != 2 or part.shape[1] != width for part in parts):
            raise ValueError(f"matrices of different inputs cannot be merged: {[(p.name, p.shape) for p in parts]}")
        self.parts: list[PackedMatrix | torch.Tensor] = []
        for form, members in groupby(parts, lambda part: form_of(part.encoding)):
            if form is not None:
                self.parts.append(pack(list(members), device))
            else:
                self.parts.append(torch.cat([part.dequantize(dtype) for part in members]).to(device))
        self._bias = torch.cat([part.dequantize(dtype) for part in bias]).to(device) if bias else None  # [out]
        self._num_outputs = sum(part.shape[0] for part in parts)
        self._dense_rows = scratch.max_rows(width, dtype)
        self._scratch = scratch

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [num_tokens, in], in the dtype of this layer → [num_tokens, out]."""
        out = torch.empty((x.shape[0], self._num_outputs), dtype=x.dtype, device=x.device)
        if x.shape[0] == 0:
            return out
        start = 0
        for part in self.parts:
            stop = start + (part.num_outputs if isinstance(part, PackedMatrix) else part.shape[0])
            bias = self._bias[start:stop] if self._bias is not None else None
            self._multiply(x, part, bias, out[:, start:stop])
            start = stop
        return out

    def _multiply(
        self, x: torch.Tensor, part: PackedMatrix | torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        if isinstance(part, torch.Tensor):
            _dense_product(x, part, bias, out)
        elif x.shape[0] <= MAX_QUANTIZED_ROWS:
            quantized_matmul(x, part, bias, out, matmul_config(x.dtype))
        else:
            for start in range(0, part.num_outputs, self._dense_rows):
                stop = min(start + self._dense_rows, part.num_outputs)
                weight = self._scratch.matrix(stop - start, part.width, x.dtype)
                dequantize_rows(part, start, weight)
                part_bias = bias[start:stop] if bias is not None else None
                _dense_product(x, weight, part_bias, out[:, start:stop])


def _dense_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out = x @ weight^T + bias; `out` may be some columns of a wider matrix."""
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


class QuantizedEmbedding:
    """A [vocab, hidden] table, kept quantised; `head` multiplies with the same memory where a model ties the two."""

    def __init__(self, table: StoredWeight, device: torch.device, dtype: torch.dtype, scratch: DenseScratch) -> None:
        self.head = QuantizedLinear([table], (), device, dtype, scratch)
        self._dtype = dtype

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids integers [num_tokens], each below vocab → [num_tokens, hidden]."""
        table = self.head.parts[0]
        if isinstance(table, PackedMatrix):
            return look_up_rows(table, token_ids, self._dtype)
        return table.index_select(0, token_ids)
