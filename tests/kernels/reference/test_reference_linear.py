"""Packing, norms and activations of the reference backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from octavo.kernels.reference import linear
from octavo.kernels.reference.backend import ReferenceBackend
from octavo.kernels.select import select_backend

CPU = torch.device("cpu")


class Weight:
    """A StoredWeight over a tensor."""

    encoding = "F32"

    def __init__(self, tensor: torch.Tensor, name: str = "w") -> None:
        self.tensor = tensor
        self.name = name

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def raw(self) -> torch.Tensor:
        return self.tensor.view(torch.uint8)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return self.tensor.to(dtype, copy=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_merged_matrices_equal_separate_ones(dtype, num_tokens, biased):
    backend = ReferenceBackend(CPU, dtype)
    parts = [torch.randn(rows, 32) / 6 for rows in (48, 16, 16)]
    biases = [torch.randn(part.shape[0]) for part in parts] if biased else []
    packed = backend.pack_linear([Weight(part) for part in parts], [Weight(bias) for bias in biases])
    x = torch.randn(num_tokens, 32).to(dtype)
    weight = torch.cat(parts).to(dtype)
    expected = F.linear(x, weight, torch.cat(biases).to(dtype) if biased else None)
    torch.testing.assert_close(backend.linear(x, packed), expected, rtol=2e-2, atol=2e-2)


def test_matrices_of_different_inputs_do_not_merge():
    backend = ReferenceBackend(CPU, torch.float32)
    with pytest.raises(ValueError, match="cannot be merged"):
        backend.pack_linear([Weight(torch.zeros(4, 8)), Weight(torch.zeros(4, 6))])


def test_without_packed_products_plain_ones_serve(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)
    assert not linear.can_prepack(CPU, torch.bfloat16)
    assert not linear.can_prepack(CPU, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_embeds_and_serves_as_head(dtype):
    backend = ReferenceBackend(CPU, dtype)
    table = torch.randn(64, 32) / 6
    packed = backend.pack_embedding(Weight(table))
    ids = torch.tensor([3, 63, 3, 0])
    assert torch.equal(backend.embed(ids, packed), table.to(dtype)[ids])
    x = torch.randn(2, 32).to(dtype)
    torch.testing.assert_close(backend.linear(x, packed), F.linear(x, table.to(dtype)), rtol=2e-2, atol=2e-2)


def test_add_rms_norm_is_addition_then_norm():
    backend = ReferenceBackend(CPU, torch.float32)
    x, residual, weight = torch.randn(5, 32), torch.randn(5, 32), torch.randn(32)
    total = x + residual
    normed, new_residual = backend.add_rms_norm(x.clone(), residual.clone(), weight, 1e-5)
    torch.testing.assert_close(new_residual, total)
    expected = total / (total.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(normed, expected)


def test_a_gate_takes_the_gate_first():
    backend = ReferenceBackend(CPU, torch.float32)
    gate_up = torch.randn(3, 20)
    torch.testing.assert_close(backend.gated(gate_up, "silu"), F.silu(gate_up[:, :10]) * gate_up[:, 10:])


def test_backends_are_selected_by_name():
    assert select_backend("reference", CPU, torch.float32, 64).name == "reference"
    with pytest.raises(ValueError, match="unknown kernel backend"):
        select_backend("nonesuch", CPU, torch.float32, 64)
