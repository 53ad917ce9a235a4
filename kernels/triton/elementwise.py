"""The memory-bound operators between matrix products, one pass each: norms and gated activations."""

from __future__ import annotations

import torch

import triton
import triton.language as tl

_MAX_TILE = 1024


@triton.jit
def rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, out_ptr, eps, x_stride, HIDDEN: tl.constexpr,
                    WIDTH: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    """One row: optionally residual += x, then out = residual / rms(residual) * weight, with fp32 statistics."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    real = columns < HIDDEN
    x = tl.load(x_ptr + row * x_stride + columns, mask=real, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row * HIDDEN + columns, mask=real, other=0.0).to(tl.float32)
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * HIDDEN + columns, rounded, mask=real)
        # What the next layer will read as the residual is what is normalised.
        x = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)
    weight = tl.load(weight_ptr + columns, mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * HIDDEN + columns, (x * inverse * weight).to(out_ptr.dtype.element_ty), mask=real)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., hidden], rows evenly spaced → a new tensor of its shape."""
    hidden = x.shape[-1]
    rows = x.view(-1, hidden)
    out = torch.empty((rows.shape[0], hidden), dtype=x.dtype, device=x.device)
    _launch_norm(rows, rows, weight, out, eps, add=False)
    return out.view(x.shape)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """residual += x in place; returns the norm of that. Both [num_rows, hidden], residual contiguous."""
    out = torch.empty_like(residual)
    _launch_norm(x, residual, weight, out, eps, add=True)
    return out


def _launch_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float, *, add: bool
) -> None:
    hidden = x.shape[-1]
    width = triton.next_power_of_2(hidden)
    rms_norm_kernel[(x.shape[0],)](
        x, residual, weight, out, eps, x.stride(0), HIDDEN=hidden, WIDTH=width, ADD=add,
        num_warps=min(16, max(1, width // 512)))  # fmt: skip


@triton.jit
def gated_kernel(gate_up_ptr, out_ptr, width, ACTIVATION: tl.constexpr, TILE: tl.constexpr):
    """out = activation(gate) * up, for one tile of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = columns < width
    gate = tl.load(gate_up_ptr + row * 2 * width + columns, mask=real, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + columns, mask=real, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        active = gate * tl.sigmoid(gate)
    elif ACTIVATION == "gelu_tanh":
        # tanh(z) = 2 sigmoid(2 z) - 1, hence (1 + tanh(z)) / 2 = sigmoid(2 z)
        active = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        active = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out_ptr + row * width + columns, (active * up).to(out_ptr.dtype.element_ty), mask=real)


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """[num_tokens, 2 * n], contiguous → activation(first half) * second half [num_tokens, n].

    activation: silu | gelu_tanh | gelu.
    """
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    tile = min(_MAX_TILE, triton.next_power_of_2(width))
    gated_kernel[(num_tokens, triton.cdiv(width, tile))](
        gate_up, out, width, ACTIVATION=activation, TILE=tile, num_warps=4
    )
    return out
