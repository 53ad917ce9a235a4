"""Products in integers, as quantised weights take them with bfloat16: what is rounded, what is exact, and that all
instruction sets agree to the last bit."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
from native_matrices import DENSE, FLOATS_AT, Weight, assert_product, linear, multiplied, random_weight, rows, width_of
from octavo.kernels.cpu.library import NativeContext, supported_isas
from octavo.kernels.cpu.packing import NATIVE_ENCODINGS, pack_matrix
from octavo.model.weights.ggml_types import BLOCK_LAYOUT

pytestmark = pytest.mark.skipif(not supported_isas(), reason="no native library for this machine")
QUANTISED = [encoding for encoding in NATIVE_ENCODINGS if encoding not in DENSE]


@pytest.fixture(params=supported_isas())
def context(request: pytest.FixtureRequest) -> Iterator[NativeContext]:
    with NativeContext(torch.bfloat16, 2, request.param) as context:
        yield context


@pytest.mark.parametrize("encoding", QUANTISED)
def test_a_step_of_large_inputs_does_not_blur_the_others(context: NativeContext, encoding: str) -> None:
    weight = random_weight(encoding, 70, width_of(encoding))
    matrix = pack_matrix([weight], context)
    x = rows(context, 20, weight.shape[1])
    x[:, 40:64] *= 300
    x[3, 32:] = 0
    x[4] *= 1e-12
    x[5] *= 1e12
    for some in (x, x[:7]):
        for y, row in zip(linear(context, matrix, some), some, strict=True):
            assert_product(y[None], *multiplied(context, row[None], weight))
    assert not linear(context, matrix, torch.zeros_like(x)).any()


@pytest.mark.parametrize("encoding", QUANTISED)
def test_codes_at_their_limits_are_summed_exactly(context: NativeContext, encoding: str) -> None:
    """All bits of the codes set, or none, and all inputs as large as can be: the sums that use most bits, where byte
    products may not saturate."""
    weight = random_weight(encoding, 16, width_of(encoding))
    raw = weight.raw().clone()
    ordinary = weight.dequantize(torch.float32)
    for value in (0, 255):
        extreme = Weight(encoding, torch.where(_free_bytes(weight), torch.tensor(value, dtype=torch.uint8), raw))
        assert not torch.equal(extreme.dequantize(torch.float32), ordinary)
        matrix = pack_matrix([extreme], context)
        x = torch.ones(17, weight.shape[1], dtype=torch.bfloat16)
        x[::2] *= -3
        y = linear(context, matrix, x)
        assert_product(y, *multiplied(context, x, extreme))
        assert torch.equal(torch.cat([linear(context, matrix, row[None]) for row in x]), y)


def _free_bytes(weight: Weight) -> torch.Tensor:
    """Bytes of a file's rows that may be anything: all but the fp16 fields."""
    block_bytes = BLOCK_LAYOUT[weight.encoding][1]
    free = torch.ones(block_bytes, dtype=torch.bool)
    for start in FLOATS_AT[weight.encoding]:
        free[start : start + 2] = False
    return free.repeat(weight.raw().shape[1] // block_bytes).expand_as(weight.raw())


@pytest.mark.parametrize("encoding", QUANTISED)
def test_instruction_sets_give_the_same_bits(encoding: str) -> None:
    weight = random_weight(encoding, 395, width_of(encoding, short=160))  # panels by twos, and one by itself
    found = []
    for isa in supported_isas():
        with NativeContext(torch.bfloat16, 2, isa) as context:
            found.append(linear(context, pack_matrix([weight], context), rows(context, 45, weight.shape[1])))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("encoding", ["Q4_1", "Q4_0", "Q2_K", "Q6_K"])  # sums of 32, of 16, scaled and as they are
def test_steps_rounded_at_once_are_those_rounded_one_by_one(encoding: str) -> None:
    """AVX2 rounds a step at a time, AVX-512 sixteen of one or several rows, and what is left over a step at a time."""
    weight = random_weight(encoding, 20, 1280)
    with contextlib.ExitStack() as stack:
        contexts = [stack.enter_context(NativeContext(torch.bfloat16, 2, isa)) for isa in supported_isas()]
        matrices = [pack_matrix([weight], context) for context in contexts]
        for num_rows in (*range(1, 19), 31, 33):
            x = rows(contexts[0], num_rows, 1280)
            x[:, :320] *= 1e-31  # counts as zeros
            x[num_rows // 2, 640:] = 0.0
            found = [linear(context, matrix, x) for context, matrix in zip(contexts, matrices, strict=True)]
            assert found[0].isfinite().all()
            assert all(torch.equal(found[0], other) for other in found[1:]), num_rows


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_rows", [1, 3, 20])
def test_what_is_not_finite_stays_visible(context: NativeContext, bad: float, num_rows: int) -> None:
    matrix = pack_matrix([random_weight("Q8_0", 20, 576)], context)
    x = rows(context, num_rows, 576)
    clean = linear(context, matrix, x)
    x[0, 37] = bad
    found = linear(context, matrix, x)
    assert not found[0].isfinite().any()
    assert torch.equal(found[1:], clean[1:])
