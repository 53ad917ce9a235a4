"""Matrices of any encoding at random, and products with them, for tests of the native library."""

from __future__ import annotations

import math

import torch
from octavo.kernels.cpu.library import NativeContext, Op, OpKind, Step
from octavo.kernels.cpu.packing import PackedMatrix
from octavo.model.weights.dequantize import dequantize_rows
from octavo.model.weights.ggml_types import BLOCK_LAYOUT

FLOATS_AT = {
    "F32": (),
    "F16": (),
    "BF16": (),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Where the fp16 fields of a block are; all its other bits are free."""
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Weight:
    """A StoredWeight over the file's bytes."""

    name = "w"

    def __init__(self, encoding: str, raw: torch.Tensor) -> None:
        block_size, block_bytes = BLOCK_LAYOUT[encoding]
        self.encoding = encoding
        self.shape = (raw.shape[0], raw.shape[1] // block_bytes * block_size)
        self._raw = raw

    def raw(self) -> torch.Tensor:
        return self._raw

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_rows(self._raw, self.encoding, dtype)


def random_weight(encoding: str, num_outputs: int, width: int, seed: int = 0) -> Weight:
    """Every bit at random but in floats, which are finite and of either sign."""
    generator = torch.Generator().manual_seed(seed)
    if encoding in DENSE:
        values = torch.randn(num_outputs, width, generator=generator).to(DENSE[encoding])
        return Weight(encoding, values.view(torch.uint8))
    block_size, block_bytes = BLOCK_LAYOUT[encoding]
    assert width % block_size == 0
    blocks = torch.randint(
        0, 256, (num_outputs * width // block_size, block_bytes), dtype=torch.uint8, generator=generator
    )
    for start in FLOATS_AT[encoding]:
        values = torch.randn(blocks.shape[0], 1, generator=generator) / 8
        blocks[:, start : start + 2] = values.half().view(torch.uint8)
    return Weight(encoding, blocks.view(num_outputs, -1))


def width_of(encoding: str, dense: int = 75, short: int = 96) -> int:
    """Not a multiple of the step where the encoding allows that."""
    block_size = BLOCK_LAYOUT[encoding][0]
    return {1: dense, 32: short, 256: 512}[block_size]


def linear(
    context: NativeContext,
    matrix: PackedMatrix,
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    keep_fp32: bool = True,
) -> torch.Tensor:
    out = torch.full((x.shape[0], matrix.num_outputs), math.nan, dtype=torch.float32 if keep_fp32 else context.dtype)
    op = Op(kind=OpKind.LINEAR, a=x.data_ptr(), out=out.data_ptr(), weight=matrix.pointer)
    op.b = bias.data_ptr() if bias is not None else None
    op.stride_a, op.stride_out = x.stride(0), out.stride(0)
    op.n[0] = int(keep_fp32)
    context.run([op], Step(num_tokens=x.shape[0]))
    return out


def rows(context: NativeContext, num_rows: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)).to(context.dtype)


def rounded_rows(x: torch.Tensor) -> torch.Tensor:
    """Rows as products in integers have them: every 32 inputs in 8 bits with a scale of their own. fp64."""
    steps = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 32)).view(x.shape[0], -1, 32)
    largest = steps.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 1e-30, torch.full_like(largest, 127) / largest, 0.0)
    whole = (steps * inverse).round()
    return (whole.double() * (largest / torch.full_like(largest, 127)).double()).view(x.shape[0], -1)[:, : x.shape[1]]


def multiplied(context: NativeContext, x: torch.Tensor, weight: Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows and the weights that a product of the two really multiplies."""
    if context.dtype is torch.bfloat16 and weight.encoding not in DENSE:
        return rounded_rows(x), weight.dequantize(torch.float32)
    return x, weight.dequantize(context.dtype)


def assert_product(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """y = x @ weight^T + bias, but for the rounding of sums and of the result."""
    expected = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        expected = expected + bias.double()
    slack = 1e-6 * magnitude + torch.finfo(y.dtype).eps * expected.abs() + 1e-6
    assert ((y.double() - expected).abs() <= slack).all()
