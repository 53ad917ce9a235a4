"""The kernels around attention, under the interpreter, against plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from octavo.kernels.backend import AttentionSpec
from octavo.kernels.triton.elementwise import add_rms_norm, gated, rms_norm
from octavo.kernels.triton.rope import rope_write

BLOCK = 16


def rotated(x: torch.Tensor, table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x [num_tokens, heads, head_dim]"""
    width = table.shape[1]
    cos, sin = table[positions][:, None].chunk(2, dim=-1)
    low, high = x[..., : width // 2], x[..., width // 2 : width]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, x[..., width:]), dim=-1)


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"),
    [(9, 3, 64, 64), (4, 2, 96, 96), (4, 4, 80, 32), (5, 1, 80, 32), (4, 2, 256, 256)],
)
def test_rope_write(heads: int, kv_heads: int, head_dim: int, rotary_dim: int, normed: bool) -> None:
    torch.manual_seed(heads + head_dim)
    spec = AttentionSpec(heads, kv_heads, head_dim, 1.0)
    qkv = torch.randn(5, (heads + 2 * kv_heads) * head_dim)
    before = qkv.clone().view(5, -1, head_dim)
    table = torch.randn(100, rotary_dim)
    positions = torch.tensor([0, 5, 99, 3, 7])
    slots = torch.tensor([17, 3, -1, 40, 63])
    layer = torch.full((4, 2, kv_heads, BLOCK, head_dim), 7.0)
    q_norm, k_norm = torch.randn(head_dim), torch.randn(head_dim)

    q = rope_write(qkv, table, positions, slots, layer, spec, (q_norm, k_norm, 1e-5) if normed else None)

    x = before.clone()
    if normed:
        x[:, :heads] = F.rms_norm(x[:, :heads], (head_dim,), q_norm, 1e-5)
        x[:, heads : heads + kv_heads] = F.rms_norm(x[:, heads : heads + kv_heads], (head_dim,), k_norm, 1e-5)
    expected = rotated(x, table, positions)
    written = slots >= 0
    torch.testing.assert_close(q[written], expected[written, :heads])
    assert torch.equal(q[~written], before[~written, :heads])  # a padded row is left alone
    pool = torch.full_like(layer, 7.0)
    for token in written.nonzero().view(-1).tolist():
        block, offset = divmod(int(slots[token]), BLOCK)
        pool[block, 0, :, offset] = expected[token, heads : heads + kv_heads]
        pool[block, 1, :, offset] = x[token, heads + kv_heads :]
    torch.testing.assert_close(layer, pool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("hidden", [48, 576, 1024])
def test_norms(hidden: int, dtype: torch.dtype) -> None:
    torch.manual_seed(hidden)
    x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((3, hidden), (3, hidden), (hidden,)))
    close = {"rtol": 1.6e-2, "atol": 1e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}

    def norm(y: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(y.float(), (hidden,), weight.float(), 1e-5).to(dtype)

    torch.testing.assert_close(rms_norm(x, weight, 1e-5), norm(x), **close)
    total = residual.clone()
    out = add_rms_norm(x, total, weight, 1e-5)
    torch.testing.assert_close(total, x + residual, **close)
    torch.testing.assert_close(out, norm(total), **close)


def test_norm_of_rows_that_are_not_contiguous() -> None:
    wide = torch.randn(4, 100)
    weight = torch.randn(64)
    torch.testing.assert_close(rms_norm(wide[:, :64], weight, 1e-6), F.rms_norm(wide[:, :64], (64,), weight, 1e-6))


@pytest.mark.parametrize("width", [48, 1536])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated_activations(activation: str, width: int) -> None:
    gate_up = torch.randn(3, 2 * width) * 3
    gate, up = gate_up.chunk(2, dim=-1)
    active = {"silu": F.silu(gate), "gelu": F.gelu(gate), "gelu_tanh": F.gelu(gate, approximate="tanh")}[activation]
    torch.testing.assert_close(gated(gate_up, activation), active * up)
