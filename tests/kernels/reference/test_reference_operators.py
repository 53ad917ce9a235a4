"""Operators that some families need, each against the formula of transformers or one written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from octavo.kernels.backend import AttentionInputs, AttentionSpec, MoeSpec, QKNorms
from octavo.kernels.reference.backend import ReferenceBackend

CPU = torch.device("cpu")


class Weight:
    """A StoredWeight over a tensor."""

    name = "w"
    encoding = "F32"

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self.shape = tuple(tensor.shape)

    def raw(self) -> torch.Tensor:
        return self._tensor.view(torch.uint8)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return self._tensor.to(dtype, copy=True)


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def backend(request: pytest.FixtureRequest) -> ReferenceBackend:
    torch.manual_seed(0)
    return ReferenceBackend(CPU, request.param)


def test_a_norm_with_an_offset_is_gemmas(backend: ReferenceBackend) -> None:
    """x / rms(x) * (1 + w), all in fp32, rounded once."""
    weight, x = torch.randn(32) * 0.01, torch.randn(5, 32).to(backend.dtype)
    packed = backend.pack_vector(Weight(weight), 1.0)
    wide = x.float()
    expected = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + weight)
    torch.testing.assert_close(backend.rms_norm(x, packed, 1e-6), expected.to(backend.dtype), rtol=1e-5, atol=1e-6)


def test_neighbouring_parts_are_normed_apart_and_the_rest_stays(backend: ReferenceBackend) -> None:
    x = torch.randn(3, 40).to(backend.dtype)
    weights = [torch.randn(size).to(backend.dtype) for size in (16, 8)]
    expected = torch.cat(
        [F.rms_norm(x[:, :16], (16,), weights[0], 1e-5), F.rms_norm(x[:, 16:24], (8,), weights[1], 1e-5), x[:, 24:]],
        dim=1,
    )
    assert torch.equal(backend.norm_parts(x.clone(), weights, 1e-5), expected)


def test_additions_scale_what_is_added(backend: ReferenceBackend) -> None:
    x, residual = (torch.randn(4, 8).to(backend.dtype) for _ in range(2))
    weight = torch.ones(8, dtype=backend.dtype)
    expected = (residual.float() + 0.25 * x.float()).to(backend.dtype)
    assert torch.equal(backend.add(x, residual.clone(), 0.25), expected)
    normed, total = backend.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6, 0.25)
    assert torch.equal(total, expected)
    assert torch.equal(normed, backend.rms_norm(expected, weight, 1e-6))


def test_the_embedding_scale_is_rounded_first(backend: ReferenceBackend) -> None:
    table, scale = torch.randn(10, 8), 3072**0.5
    ids = torch.tensor([3, 0, 9])
    expected = table.to(backend.dtype)[ids] * torch.tensor(scale, dtype=backend.dtype)
    packed = backend.pack_embedding(Weight(table))
    assert torch.equal(backend.embed(ids, packed, scale), expected)
    assert torch.equal(backend.embed(ids, packed), table.to(backend.dtype)[ids])


def test_logits_are_scaled_and_then_capped(backend: ReferenceBackend) -> None:
    x, weight = torch.randn(3, 8).to(backend.dtype), torch.randn(12, 8)
    head = backend.pack_linear([Weight(weight)])
    plain = backend.logits(x, head).float()
    capped = backend.logits(x, head, scale=0.5, soft_cap=2.0).float()
    torch.testing.assert_close(capped, 2 * (plain * 0.5 / 2).tanh(), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_gates(backend: ReferenceBackend, activation: str) -> None:
    gate, up = torch.randn(3, 6).to(backend.dtype), torch.randn(3, 6).to(backend.dtype)
    function = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }[activation]
    out = backend.gated(torch.cat((gate, up), dim=1), activation)  # type: ignore[arg-type]
    torch.testing.assert_close(out, function(gate) * up)


@pytest.mark.parametrize("renormalize", [True, False])
def test_a_token_gets_the_weighted_sum_of_its_experts_in_any_company(renormalize: bool) -> None:
    torch.manual_seed(0)
    backend = ReferenceBackend(CPU, torch.float32)
    gate, up = torch.randn(6, 10, 8), torch.randn(6, 10, 8)
    down = torch.randn(6, 8, 10)
    experts = backend.pack_experts(
        [[Weight(g), Weight(u)] for g, u in zip(gate, up, strict=True)], [Weight(matrix) for matrix in down]
    )
    spec = MoeSpec(num_experts=6, num_experts_per_token=2, renormalize=renormalize, activation="silu")
    x, logits = torch.randn(7, 8), torch.randn(7, 6)
    out = backend.moe(x, logits, experts, spec)
    for token in range(7):
        weights = logits[token].softmax(-1)
        chosen = weights.topk(2).indices.tolist()
        total = float(weights[chosen].sum()) if renormalize else 1.0
        expected = sum(
            weights[e] / total * (down[e] @ (F.silu(gate[e] @ x[token]) * (up[e] @ x[token]))) for e in chosen
        )
        torch.testing.assert_close(out[token], expected, rtol=1e-5, atol=1e-5)
        alone = backend.moe(x[token : token + 1], logits[token : token + 1], experts, spec)
        torch.testing.assert_close(alone[0], out[token], rtol=1e-5, atol=1e-5)


def test_heads_are_normed_before_they_are_rotated_and_values_are_not(backend: ReferenceBackend) -> None:
    spec = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=8, scale=1.0)
    inputs = AttentionInputs(
        num_rows=1, num_decode_rows=0, max_query_len=2, query_lens=[2], context_lens=[2],
        query_starts=torch.tensor([0, 2]), kv_lens=torch.tensor([2]), positions=torch.tensor([0, 1]),
        slots=torch.tensor([4, 5]), block_tables=torch.tensor([[1]]),
    )  # fmt: skip
    plan = backend.plan_attention(inputs, spec, 4)
    layer = torch.zeros(2, 2, 1, 4, 8, dtype=backend.dtype)
    table = torch.cat((torch.ones(2, 4), torch.zeros(2, 4)), dim=1)  # no rotation
    norms = QKNorms(torch.rand(8), torch.rand(8), 1e-6)
    qkv = torch.randn(2, 32).to(backend.dtype)
    heads = qkv.clone().view(2, 4, 8)
    q = backend.rope_and_write_kv(qkv, table, layer, plan, spec, norms)
    assert torch.equal(q, backend.rms_norm(heads[:, :2], norms.q, 1e-6))
    assert torch.equal(layer[1, 0, 0, :2], backend.rms_norm(heads[:, 2], norms.k, 1e-6))
    assert torch.equal(layer[1, 1, 0, :2], heads[:, 3])
