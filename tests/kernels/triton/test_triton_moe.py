"""Layers with experts, under the interpreter, against the reference backend."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from octavo.kernels.backend import MoeSpec
from octavo.kernels.reference.backend import ReferenceBackend
from octavo.kernels.triton.backend import TritonBackend
from octavo.kernels.triton.moe import experts_config, route

CPU = torch.device("cpu")
SPEC = MoeSpec(num_experts=6, num_experts_per_token=2, renormalize=True, activation="silu")


class Weight:
    """A StoredWeight of random values."""

    name = "expert"
    encoding = "F32"

    def __init__(self, seed: int, *shape: int) -> None:
        self.shape = shape
        self._values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[1] ** 0.5

    def raw(self) -> torch.Tensor:
        return self._values.view(torch.uint8)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return self._values.to(dtype, copy=True)


def packed(backend: ReferenceBackend, hidden: int, inner: int) -> object:
    gate_up = [[Weight(3 * e, inner, hidden), Weight(3 * e + 1, inner, hidden)] for e in range(SPEC.num_experts)]
    return backend.pack_experts(gate_up, [Weight(3 * e + 2, hidden, inner) for e in range(SPEC.num_experts)])


def batch(num_tokens: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Most choose the first expert, nobody the last."""
    generator = torch.Generator().manual_seed(num_tokens)
    logits = torch.randn(num_tokens, SPEC.num_experts, generator=generator)
    logits[:, 0] += 2
    logits[:, -1] = -30
    return torch.randn(num_tokens, hidden, generator=generator).to(dtype), logits.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("num_tokens", "hidden", "inner"), [(0, 64, 32), (1, 64, 48), (30, 40, 20), (110, 48, 32)])
def test_experts_equal_the_reference(num_tokens: int, hidden: int, inner: int, dtype: torch.dtype) -> None:
    ours, oracle = TritonBackend(CPU, dtype), ReferenceBackend(CPU, torch.float32)
    x, logits = batch(num_tokens, hidden, dtype)
    for renormalize, activation in ((True, "silu"), (False, "gelu_tanh")):
        spec = dataclasses.replace(SPEC, renormalize=renormalize, activation=activation)
        found = ours.moe(x, logits, packed(ours, hidden, inner), spec)
        exact = oracle.moe(x.float(), logits.float(), packed(oracle, hidden, inner), spec)  # type: ignore[arg-type]
        close = {"rtol": 5e-3, "atol": 5e-3} if dtype is torch.float16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(found.float(), exact, **close)


def test_both_tiles_were_tried() -> None:
    tiles = {experts_config(2 * tokens, 6, torch.float32).rows for tokens in (1, 30, 110)}
    assert tiles == {16, 32}


def test_a_token_is_the_same_alone_and_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies tiles with numpy, whose BLAS on some processors rounds a row by its place in the tile.
    Here every row is summed in one order instead, so that what is left to differ is the kernels' own."""

    def in_one_order(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return (a[:, :, None].astype(dtype) * b[None]).sum(axis=1)

    monkeypatch.setattr(np, "matmul", in_one_order)
    backend = TritonBackend(CPU, torch.float32)
    experts, (x, logits) = packed(backend, 64, 32), batch(40, 64, torch.float32)
    together = backend.moe(x, logits, experts, SPEC)
    alone = [backend.moe(x[i : i + 1], logits[i : i + 1], experts, SPEC) for i in (0, 17, 39)]
    assert torch.equal(torch.cat(alone), together[[0, 17, 39]])


def test_equal_logits_choose_the_first_and_a_nan_chooses_some() -> None:
    logits = torch.zeros(3, 6)
    logits[1, 4] = 1.0
    logits[2, 3] = torch.nan
    weights, choices = route(logits, SPEC)
    assert choices[:2].tolist() == [[0, 1], [4, 0]]
    torch.testing.assert_close(weights[0], torch.tensor([0.5, 0.5]))
    assert set(choices[2].tolist()) <= set(range(6))
    assert weights[2].isnan().all()
