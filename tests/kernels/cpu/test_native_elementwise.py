"""Norms, sums, gated activations, the choice of rows and rotation in native code, against float64 written out."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from octavo.kernels.cpu.library import Attention, Group, NativeContext, Op, OpKind, Step, supported_isas

pytestmark = pytest.mark.skipif(not supported_isas(), reason="the native library was not built")

everywhere = pytest.mark.parametrize("isa", supported_isas())
both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
WIDTHS = (1, 7, 16, 40, 64, 100, 576)
ROUNDING = {torch.float32: 4e-7, torch.bfloat16: 2**-8}
"""Of a result relative to the exact one, a little more than one rounding."""


@functools.cache
def context(isa: str, dtype: torch.dtype, num_threads: int) -> NativeContext:
    return NativeContext(dtype, num_threads, isa)


def unaligned(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random rows further apart than they are wide, one element off any alignment."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape[0], shape[1] + 3, generator=generator).to(dtype)
    return torch.cat([rows.new_zeros(1), rows.flatten()])[1:].view(rows.shape)[:, : shape[1]]


def run(native: NativeContext, kind: OpKind, num_rows: int, **fields: Any) -> None:
    """One operator; tensors give a pointer and a stride, tuples fill n and f."""
    op = Op(kind=kind)
    for name, value in fields.items():
        if isinstance(value, torch.Tensor):
            setattr(op, name, value.data_ptr())
            if name != "weight":
                setattr(op, f"stride_{name}", value.stride(0))
        else:
            getattr(op, name)[: len(value)] = value
    native.run([op], Step(num_tokens=num_rows))


def assert_rounded(found: torch.Tensor, exact: torch.Tensor) -> None:
    """Up to one rounding, and to what fp32 loses where numbers of up to ten cancel."""
    torch.testing.assert_close(found.double(), exact, rtol=ROUNDING[found.dtype], atol=4e-6)


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x.double(), (x.shape[-1],), weight.double(), 1e-5)


@everywhere
@both
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(isa: str, dtype: torch.dtype, width: int) -> None:
    x, weight = unaligned(5, 3 * width, dtype=dtype), torch.randn(width + 1)[1:]
    out = torch.full_like(x, 7.0)
    run(context(isa, dtype, 2), OpKind.RMS_NORM, 5, a=x, out=out, weight=weight, n=(width, 3), f=(1e-5,))
    heads = x.unflatten(1, (3, width))
    assert_rounded(out.unflatten(1, (3, width)), norm(heads, weight))


@everywhere
@both
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_add_rms_norm_norms_the_sum_as_stored(isa: str, dtype: torch.dtype, width: int, scale: float) -> None:
    x, residual = unaligned(5, width, dtype=dtype), unaligned(5, width, dtype=dtype, seed=1)
    weight, expected = torch.randn(width), (scale * x.float() + residual).to(dtype)
    out = torch.empty_like(x)
    fields = {"a": x, "b": residual, "out": out, "out2": residual, "weight": weight}
    run(context(isa, dtype, 2), OpKind.ADD_RMS_NORM, 5, **fields, n=(width, 1), f=(1e-5, scale))
    assert torch.equal(residual, expected)
    assert_rounded(out, norm(expected, weight))


@everywhere
@both
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_add(isa: str, dtype: torch.dtype, width: int, scale: float) -> None:
    x, y = unaligned(9, width, dtype=dtype), unaligned(9, width, dtype=dtype, seed=1)
    expected = (scale * x.float() + y).to(dtype)
    run(context(isa, dtype, 2), OpKind.ADD, 9, a=x, b=y, out=y, n=(width,), f=(scale,))
    assert torch.equal(y, expected)


ACTIVATIONS = {
    0: F.silu,
    1: F.gelu,
    2: functools.partial(F.gelu, approximate="tanh"),
}


@everywhere
@both
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [1, 20, 1536])
def test_gated(isa: str, dtype: torch.dtype, activation: int, width: int) -> None:
    gate_up = unaligned(3, 2 * width, dtype=dtype)
    gate_up[1] *= 8
    gate_up[2, :width] = torch.linspace(-100, 100, width).to(dtype)
    out = unaligned(3, width, dtype=dtype)
    run(context(isa, dtype, 2), OpKind.GATED, 3, a=gate_up, out=out, n=(width, activation))
    gate, up = gate_up.double().chunk(2, 1)
    exact = ACTIVATIONS[activation](gate) * up
    # Both gelus are x * 0.5 * (1 + t) with t close to -1 for negative x: t has the error of an fp32 number near 1.
    allowed = ROUNDING[dtype] * 1.5 * exact.abs() + 2e-7 * (gate * up).abs() * (activation != 0) + 1e-30
    assert ((out.double() - exact).abs() <= allowed).all()


@everywhere
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_what_is_not_finite(isa: str, activation: int) -> None:
    gate = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30, -1e30])
    gate_up, out = torch.cat([gate, torch.ones(7)])[None], torch.empty(1, 7)
    run(context(isa, torch.float32, 1), OpKind.GATED, 1, a=gate_up, out=out, n=(7, activation))
    expected = ACTIVATIONS[activation](gate.double()).float()
    torch.testing.assert_close(out[0], expected, equal_nan=True)


@everywhere
@both
@pytest.mark.parametrize("width", [1, 20, 1536])
def test_caps_fp32_in_place(isa: str, dtype: torch.dtype, width: int) -> None:
    x = unaligned(5, width, dtype=torch.float32) * 9
    x[:, 0] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e30])
    for scale, cap in ((0.25, 0.0), (0.5, 3.0)):
        out, exact = x.clone(), x.double() * scale
        run(context(isa, dtype, 2), OpKind.CAP, 5, a=out, out=out, n=(width,), f=(scale, cap))
        expected = cap * (exact / cap).tanh() if cap else exact
        torch.testing.assert_close(out, expected.float(), rtol=1e-6, atol=1e-6, equal_nan=True)


@everywhere
@both
def test_select_rows(isa: str, dtype: torch.dtype) -> None:
    x, indices = unaligned(20, 33, dtype=dtype), torch.tensor([3, 3, 19, 0])
    out = unaligned(4, 33, dtype=dtype)
    op = Op(kind=OpKind.SELECT_ROWS, rows=1, a=x.data_ptr(), out=out.data_ptr())
    op.stride_a, op.stride_out, op.n[0] = x.stride(0), out.stride(0), 33
    context(isa, dtype, 2).run([op], Step(num_logits=4, logits_indices=indices.data_ptr()))
    assert torch.equal(out, x[indices])


@everywhere
@both
def test_a_row_is_the_same_alone_and_among_others(isa: str, dtype: torch.dtype) -> None:
    rows, width = 67, 300
    x, y = unaligned(rows, 2 * width, dtype=dtype), unaligned(rows, 2 * width, dtype=dtype, seed=1)
    weight = torch.randn(2 * width)
    normed, gated = torch.empty_like(x), x.new_empty(rows, width)
    alone_normed, alone_gated = torch.empty_like(x), x.new_empty(rows, width)
    for native, step in ((context(isa, dtype, 2), rows), (context(isa, dtype, 1), 1)):
        norms, gates = (normed, gated) if step == rows else (alone_normed, alone_gated)
        for at in range(0, rows, step):
            part = slice(at, at + step)
            fields = {"a": x[part], "b": y[part], "out": norms[part], "out2": y[part].clone(), "weight": weight}
            run(native, OpKind.ADD_RMS_NORM, step, **fields, n=(2 * width, 1), f=(1e-5, 1.0))
            run(native, OpKind.GATED, step, a=x[part], out=gates[part], n=(width, 0))
    assert torch.equal(normed, alone_normed)
    assert torch.equal(gated, alone_gated)


def rotated(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """x [.., head_dim], table [.., rotary_dim]; float64."""
    half = table.shape[-1] // 2
    cosine, sine = table.double().split(half, -1)
    first, second, rest = x.double().split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], -1)


def key_at(k: torch.Tensor, offset: int) -> torch.Tensor:
    """Key number `offset` of a block's K [block_size * head_dim], as native/attention.h lays it out."""
    pair = 2 if k.dtype is torch.bfloat16 else 1
    groups = k.view(-1, 64 // pair, 16, pair)
    return groups[offset // 16, :, offset % 16].flatten()


def value_at(v: torch.Tensor, offset: int) -> torch.Tensor:
    pair = 2 if v.dtype is torch.bfloat16 else 1
    return v.view(-1, 64, pair)[offset // pair, :, offset % pair]


@everywhere
@both
@pytest.mark.parametrize("rotary_dim", [64, 20, 2])
@pytest.mark.parametrize("normed", [False, True])
def test_rotates_and_writes_to_slots(isa: str, dtype: torch.dtype, rotary_dim: int, normed: bool) -> None:
    heads, kv_heads, head_dim, block_size, tokens = 4, 2, 64, 32, 11
    torch.manual_seed(rotary_dim)
    merged = unaligned(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    layer = torch.full((4, 2, kv_heads, block_size * head_dim), math.nan, dtype=dtype)
    positions, slots = torch.randperm(50)[:tokens], torch.randperm(128)[:tokens]
    slots[3] = -1
    table = torch.randn(50, rotary_dim)
    weights = [torch.rand(head_dim) + 0.5 for _ in range(2)]
    shape = Attention(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, block_size=block_size, scale=1.0)
    if normed:
        shape.q_norm, shape.k_norm, shape.norm_eps = weights[0].data_ptr(), weights[1].data_ptr(), 1e-5
    q = unaligned(tokens, heads * head_dim, dtype=dtype)
    op = Op(kind=OpKind.ROPE_WRITE, a=merged.data_ptr(), out=q.data_ptr(), out2=layer.data_ptr())
    op.weight, op.spec, op.n[0] = table.data_ptr(), ctypes.pointer(shape), rotary_dim
    op.stride_a, op.stride_out = merged.stride(0), q.stride(0)
    groups = (Group * 2)(Group(), Group(slots=slots.data_ptr()))
    op.n[1] = 1
    step = Step(num_tokens=tokens, positions=positions.data_ptr(), groups=groups)
    context(isa, dtype, 2).run([op], step)
    exact_q, exact_k, v = merged.unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], 1)
    if normed:
        exact_q, exact_k = norm(exact_q, weights[0]), norm(exact_k, weights[1])
    turn = table[positions][:, None]
    assert_rounded(q.unflatten(1, (heads, head_dim)), rotated(exact_q, turn))
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, block_size)
        for head in range(kv_heads):
            k_block, v_block = layer[block, 0, head], layer[block, 1, head]
            assert_rounded(key_at(k_block, offset), rotated(exact_k[token, head], turn[token, 0]))
            assert torch.equal(value_at(v_block, offset), v[token, head])
    # Nothing but these has been written.
    assert int(layer.isnan().sum()) == layer.numel() - (tokens - 1) * kv_heads * 2 * head_dim
