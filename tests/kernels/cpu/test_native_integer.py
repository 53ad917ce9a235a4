"""The product of a single row in integers: close to the exact one, asked for, and for single rows of quantised weights
only."""

from __future__ import annotations

import math

import pytest
import torch
from native_matrices import DENSE, assert_product, linear, random_weight, rows, width_of
from octavo.kernels.cpu.library import NativeContext, Op, OpKind, Step
from octavo.kernels.cpu.packing import NATIVE_ENCODINGS, PackedMatrix, pack_matrix
from octavo.kernels.select import label, select_backend

QUANTISED = [encoding for encoding in NATIVE_ENCODINGS if encoding not in DENSE]
CPU = torch.device("cpu")


def in_integers(context: NativeContext, matrix: PackedMatrix, x: torch.Tensor) -> torch.Tensor:
    out = torch.full((x.shape[0], matrix.num_outputs), math.nan)
    op = Op(kind=OpKind.LINEAR, a=x.data_ptr(), out=out.data_ptr(), weight=matrix.pointer)
    op.stride_a, op.stride_out = x.stride(0), out.stride(0)
    op.n[0], op.n[1] = 1, 1
    context.run([op], Step(num_tokens=x.shape[0]))
    return out


@pytest.mark.parametrize("encoding", QUANTISED)
def test_one_row_is_rounded_to_sixteen_bits_and_nothing_else(native: NativeContext, encoding: str) -> None:
    weight = random_weight(encoding, 70, width_of(encoding))
    exact = weight.dequantize(torch.float32).double()
    matrix = pack_matrix([weight], native)
    for seed in range(3):
        x = rows(native, 1, weight.shape[1], seed)
        x[:, 40:64] *= 300  # an outlier in one step must not blur the others
        x[:, 32:36] = 0
        steps = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % 32)).view(-1, 32)
        unit = (steps.abs().amax(1, keepdim=True) / 32767).expand(-1, 32).reshape(-1)[: x.shape[1]]
        slack = (unit * 0.51) @ exact.abs().T + 2e-6 * (x.double().abs() @ exact.abs().T) + 1e-6
        # Codes and scales are summed apart from offsets, which may be large and cancel.
        slack = slack + 2e-6 * 70 * (x.double().abs().sum() * exact.abs().max())
        found = in_integers(native, matrix, x)
        assert ((found.double() - x.double() @ exact.T).abs() <= slack).all()


def test_more_rows_are_multiplied_as_ever(native: NativeContext) -> None:
    matrix = pack_matrix([random_weight("Q4_1", 50, 96)], native)
    x = rows(native, 3, 96)
    assert torch.equal(in_integers(native, matrix, x), linear(native, matrix, x))


def test_dense_parts_keep_a_matrix_out_of_it(native: NativeContext) -> None:
    parts = [random_weight("Q4_0", 20, 96), random_weight("BF16", 20, 96, seed=1)]
    x = rows(native, 1, 96)
    matrix = pack_matrix(parts, native)
    assert torch.equal(in_integers(native, matrix, x), linear(native, matrix, x))
    assert_product(in_integers(native, matrix, x), x, torch.cat([part.dequantize(native.dtype) for part in parts]))


def test_parts_of_several_encodings_and_any_number_of_threads(native: NativeContext) -> None:
    parts = [random_weight(encoding, 40 + 7 * i, 256, seed=i) for i, encoding in enumerate(("Q4_K", "Q8_0", "Q6_K"))]
    x = rows(native, 1, 256)
    found = in_integers(native, pack_matrix(parts, native), x)
    alone = [in_integers(native, pack_matrix([part], native), x) for part in parts]
    assert torch.equal(found, torch.cat(alone, dim=1))
    with NativeContext(native.dtype, 1, native.info().isa.decode()) as single:
        assert torch.equal(in_integers(single, pack_matrix(parts, single), x), found)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(native: NativeContext, bad: float) -> None:
    matrix = pack_matrix([random_weight("Q8_0", 20, 64)], native)
    x = rows(native, 1, 64)
    x[0, 37] = bad
    assert not in_integers(native, matrix, x).isfinite().any()
    assert not in_integers(native, matrix, torch.zeros_like(x)).any()


def test_the_backend_says_so(native: NativeContext) -> None:
    backend = select_backend("cpu-integer", CPU, native.dtype, 64)
    assert "integer products for one row" in label(backend)
    assert "integer" not in label(select_backend("cpu", CPU, native.dtype, 64))
    weight = random_weight("Q4_1", 64, 96)
    x = rows(native, 1, 96)
    exact = select_backend("cpu", CPU, native.dtype, 64)
    close, apart = (made.logits(x, made.pack_linear([weight])) for made in (exact, backend))
    assert not torch.equal(close, apart)
    assert torch.allclose(close, apart, rtol=0.02, atol=0.02 * close.abs().max().item())
    both = torch.cat((x, x))
    assert torch.equal(*(made.logits(both, made.pack_linear([weight])) for made in (exact, backend)))
