"""Products and look-ups in native code, against float64 with the weights that the file's own decoding gives; and that a
row's bits depend on nothing but the row."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_matrices import DENSE, Weight, assert_product, linear, multiplied, random_weight, rows, width_of
from octavo.kernels.cpu.library import NativeContext, Op, OpKind, Step
from octavo.kernels.cpu.packing import NATIVE_ENCODINGS, PackedMatrix, pack_matrix
from octavo.model.weights.ggml_types import BLOCK_LAYOUT

ENCODINGS = pytest.mark.parametrize("encoding", NATIVE_ENCODINGS)
ROW_COUNTS = (1, 2, 3, 8, 9, 15, 16, 17, 31, 32, 33, 100)


def embed(context: NativeContext, matrix: PackedMatrix, ids: list[int], factor: float = 1.0) -> torch.Tensor:
    out = torch.empty((len(ids), matrix.num_inputs), dtype=context.dtype)
    token_ids = torch.tensor(ids)
    op = Op(kind=OpKind.EMBED, out=out.data_ptr(), weight=matrix.pointer, stride_out=out.stride(0))
    op.f[0] = factor
    context.run([op], Step(num_tokens=len(ids), token_ids=token_ids.data_ptr()))
    return out


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
    assert_product(alone, *multiplied(native, x, weight))
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
    weight = random_weight(encoding, 400, 1536)
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
    for num_rows in (19, 1, 9):
        alone = [linear(native, pack_matrix([part], native), x[:num_rows]) for part in parts]
        assert torch.equal(linear(native, matrix, x[:num_rows]), torch.cat(alone, dim=1))
        for part, y in zip(parts, alone, strict=True):
            assert_product(y, *multiplied(native, x[:num_rows], part))
    weight = torch.cat([part.dequantize(native.dtype) for part in parts])
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


def test_matrices_that_share_memory_outlive_one_another(native: NativeContext) -> None:
    weights = [random_weight("Q5_1", num_outputs, 64, seed=num_outputs) for num_outputs in (16, 70, 33, 5)]
    x = rows(native, 3, 64)
    matrices = [pack_matrix([weight], native) for weight in weights]
    expected = [linear(native, matrix, x) for matrix in matrices]
    del matrices[1], expected[1]
    matrices.append(pack_matrix([random_weight("F32", 40_000, 64)], native))
    expected.append(linear(native, matrices[-1], x))
    del matrices[0], expected[0]
    for matrix, before in zip(matrices, expected, strict=True):
        assert torch.equal(linear(native, matrix, x), before)


def test_no_rows_are_nothing(native: NativeContext) -> None:
    matrix = pack_matrix([random_weight("Q8_0", 8, 32)], native)
    assert linear(native, matrix, rows(native, 0, 32)).shape == (0, 8)
