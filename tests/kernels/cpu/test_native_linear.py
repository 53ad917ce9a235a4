"""Products and look-ups in native code, against float64 with the weights that the file's own decoding gives; and that a
row's bits depend on nothing but the row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from octavo.kernels.cpu.library import NativeContext, Op, OpKind, Step
from octavo.kernels.cpu.packing import NATIVE_ENCODINGS, PackedMatrix, pack_matrix
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
ENCODINGS = pytest.mark.parametrize("encoding", NATIVE_ENCODINGS)
ROW_COUNTS = (1, 2, 3, 8, 9, 15, 16, 17, 31, 32, 33, 100)


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


def embed(context: NativeContext, matrix: PackedMatrix, ids: list[int], factor: float = 1.0) -> torch.Tensor:
    out = torch.empty((len(ids), matrix.num_inputs), dtype=context.dtype)
    token_ids = torch.tensor(ids)
    op = Op(kind=OpKind.EMBED, out=out.data_ptr(), weight=matrix.pointer, stride_out=out.stride(0))
    op.f[0] = factor
    context.run([op], Step(num_tokens=len(ids), token_ids=token_ids.data_ptr()))
    return out


def rows(context: NativeContext, num_rows: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)).to(context.dtype)


def assert_product(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """y = x @ weight^T + bias, but for the rounding of sums and of the result."""
    expected = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        expected = expected + bias.double()
    slack = 1e-6 * magnitude + torch.finfo(y.dtype).eps * expected.abs() + 1e-6
    assert ((y.double() - expected).abs() <= slack).all()


@ENCODINGS
def test_a_table_gives_the_numbers_of_its_file(native: NativeContext, encoding: str) -> None:
    weight = random_weight(encoding, 37, width_of(encoding))
    matrix = pack_matrix([weight], native)
    ids = [36, 0, 17, 15, 16, 17]
    expected = weight.dequantize(native.dtype)[ids]
    assert torch.equal(embed(native, matrix, ids), expected)
    assert torch.equal(embed(native, matrix, ids, 1.5), (expected.float() * 1.5).to(native.dtype))


def test_an_unknown_token_gives_nan(native: NativeContext) -> None:
    matrix = pack_matrix([random_weight("Q8_0", 8, 64)], native)
    found = embed(native, matrix, [8, 3, -1])
    assert found[0].isnan().all()
    assert found[1].isfinite().all()
    assert found[2].isnan().all()


@ENCODINGS
def test_products_of_any_number_of_rows(native: NativeContext, encoding: str) -> None:
    weight = random_weight(encoding, 70, width_of(encoding))
    matrix = pack_matrix([weight], native)
    x = rows(native, max(ROW_COUNTS), weight.shape[1])
    alone = torch.cat([linear(native, matrix, x[i : i + 1]) for i in range(x.shape[0])])
    assert_product(alone, x, weight.dequantize(native.dtype))
    for num_rows in ROW_COUNTS:
        assert torch.equal(linear(native, matrix, x[:num_rows]), alone[:num_rows])


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_outputs=st.integers(1, 100),
    width=st.integers(1, 130),
    num_rows=st.integers(1, 40),
    encoding=st.sampled_from(sorted(DENSE)),
)
def test_dense_products_of_any_shape(
    native: NativeContext, num_outputs: int, width: int, num_rows: int, encoding: str
) -> None:
    weight = random_weight(encoding, num_outputs, width)
    matrix = pack_matrix([weight], native)
    wide = rows(native, num_rows, width + 3)
    x = wide[:, 3:]  # neither aligned nor contiguous
    bias = torch.linspace(-1, 1, num_outputs)
    y = linear(native, matrix, x, bias)
    assert_product(y, x, weight.dequantize(native.dtype), bias)
    assert torch.equal(linear(native, matrix, x, bias, keep_fp32=False), y.to(native.dtype))


@pytest.mark.parametrize("encoding", ["BF16", "Q4_1", "Q8_0", "Q6_K"])
def test_bits_do_not_depend_on_threads_or_blocks_of_rows(native: NativeContext, encoding: str) -> None:
    weight = random_weight(encoding, 176, 1536)
    x = rows(native, 700, 1536)  # more than one block of rows
    isa = native.info().isa.decode()
    matrix = pack_matrix([weight], native)
    y = linear(native, matrix, x)
    with NativeContext(native.dtype, 1, isa) as single:
        assert torch.equal(linear(single, pack_matrix([weight], single), x), y)
    assert torch.equal(linear(native, matrix, x[699:]), y[699:])
    assert torch.equal(linear(native, matrix, x[340:357]), y[340:357])


def test_parts_of_several_encodings_keep_their_order(native: NativeContext) -> None:
    encodings = ("Q4_K", "Q8_0", "F32", "Q6_K", "Q4_1")
    parts = [random_weight(encoding, 20 + 7 * i, 256, seed=i) for i, encoding in enumerate(encodings)]
    matrix = pack_matrix(parts, native)
    assert matrix.encodings == encodings
    x = rows(native, 19, 256)
    y = linear(native, matrix, x)
    assert torch.equal(y, torch.cat([linear(native, pack_matrix([part], native), x) for part in parts], dim=1))
    weight = torch.cat([part.dequantize(native.dtype) for part in parts])
    assert_product(y, x, weight)
    ids = [0, 19, 20, 46, 47, matrix.num_outputs - 1]
    assert torch.equal(embed(native, matrix, ids), weight[ids])


def test_a_nan_stays_in_its_row(native: NativeContext) -> None:
    weight = random_weight("Q4_1", 48, 96)
    matrix = pack_matrix([weight], native)
    x = rows(native, 20, 96)
    clean = linear(native, matrix, x)
    x[7, 95], x[18, 0] = math.nan, math.inf
    found = linear(native, matrix, x)
    others = [i for i in range(20) if i not in (7, 18)]
    assert torch.equal(found[others], clean[others])
    assert found[7].isnan().all()
    assert not found[18].isfinite().any()


def test_an_encoding_without_a_form_is_dequantised(native: NativeContext) -> None:
    raw = torch.randint(0, 256, (16, 18), dtype=torch.uint8)
    raw[:, :2] = torch.full((16, 1), 0.25, dtype=torch.float16).view(torch.uint8)
    weight = Weight("IQ4_NL", raw)
    matrix = pack_matrix([weight, random_weight("Q4_0", 16, 32)], native)
    assert matrix.dequantized == ("IQ4_NL",)
    assert torch.equal(embed(native, matrix, [5]), weight.dequantize(native.dtype)[5:6])


def test_quantised_weights_stay_as_small_as_in_the_file(native: NativeContext) -> None:
    extra = {"Q2_K": 0.5, "Q3_K": 0.125, "Q4_K": 0.125, "Q5_K": 0.125}  # scales in bytes instead of 4 or 6 bits
    for encoding in NATIVE_ENCODINGS:
        if encoding in DENSE:
            continue
        block_size, block_bytes = BLOCK_LAYOUT[encoding]
        matrix = pack_matrix([random_weight(encoding, 64, 2048)], native)
        bits = 8 * matrix.nbytes / (64 * 2048)
        assert bits == pytest.approx(8 * block_bytes / block_size + extra.get(encoding, 0), abs=0.01)


def test_matrices_of_different_inputs_do_not_merge(native: NativeContext) -> None:
    with pytest.raises(ValueError, match="different inputs"):
        pack_matrix([random_weight("Q8_0", 8, 32), random_weight("Q8_0", 8, 64)], native)


def test_no_rows_are_nothing(native: NativeContext) -> None:
    matrix = pack_matrix([random_weight("Q8_0", 8, 32)], native)
    assert linear(native, matrix, rows(native, 0, 32)).shape == (0, 8)
