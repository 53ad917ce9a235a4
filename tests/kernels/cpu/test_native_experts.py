"""Layers with experts in native code: against the reference backend, and the same bits in any company."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from octavo.kernels.backend import MoeSpec
from octavo.kernels.cpu.backend import CpuBackend
from octavo.kernels.cpu.library import supported_isas
from octavo.kernels.reference.backend import ReferenceBackend

pytestmark = pytest.mark.skipif(not supported_isas(), reason="the native library was not built")

CPU = torch.device("cpu")
NUM_EXPERTS = 7
SPEC = MoeSpec(num_experts=NUM_EXPERTS, num_experts_per_token=3, renormalize=True, activation="silu")
everywhere = pytest.mark.parametrize("isa", supported_isas())
both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@functools.cache
def stored(encoding: str, seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw bytes and values."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[1] ** 0.5
    kind = GGMLQuantizationType[encoding]
    packed = quantize(values.numpy(), kind)
    raw = torch.from_numpy(packed.view("uint8").reshape(shape[0], -1).copy())
    return raw, torch.from_numpy(dequantize(packed, kind).reshape(shape).copy())


class Weight:
    """A StoredWeight."""

    name = "expert"

    def __init__(self, seed: int, *shape: int, encoding: str = "F32") -> None:
        self.shape, self.encoding = shape, encoding
        self._raw, self._values = stored(encoding, seed, *shape)

    def raw(self) -> torch.Tensor:
        return self._raw

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return self._values.to(dtype, copy=True)


@dataclasses.dataclass
class Layer:
    """Experts of one layer, as stored."""

    hidden: int
    inner: int
    encoding: str = "F32"

    def packed(self, backend: CpuBackend | ReferenceBackend) -> object:
        hidden, inner, encoding = self.hidden, self.inner, self.encoding
        gate_up = [[Weight(3 * e + i, inner, hidden, encoding=encoding) for i in range(2)] for e in range(NUM_EXPERTS)]
        down = [Weight(3 * e + 2, hidden, inner, encoding=encoding) for e in range(NUM_EXPERTS)]
        return backend.pack_experts(gate_up, down)


def backend_of(isa: str, dtype: torch.dtype, num_threads: int, monkeypatch: pytest.MonkeyPatch) -> CpuBackend:
    monkeypatch.setenv("OCTAVO_CPU_ISA", isa)
    return CpuBackend(CPU, dtype, num_threads)


def batch(num_tokens: int, hidden: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and router logits; the first expert is chosen by most, the last by nobody."""
    generator = torch.Generator().manual_seed(num_tokens)
    logits = torch.randn(num_tokens, NUM_EXPERTS, generator=generator)
    logits[:, 0] += 2
    logits[:, -1] = -30
    return torch.randn(num_tokens, hidden, generator=generator).to(dtype), logits.to(dtype)


@everywhere
@both
@pytest.mark.parametrize("layer", [Layer(64, 48), Layer(40, 20), Layer(64, 96, "Q8_0"), Layer(96, 64, "Q4_0")], ids=str)
def test_experts_equal_the_reference(
    isa: str, dtype: torch.dtype, layer: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    native, oracle = backend_of(isa, dtype, 2, monkeypatch), ReferenceBackend(CPU, torch.float32)
    ours, theirs = layer.packed(native), layer.packed(oracle)
    for num_tokens in (0, 1, 5, 9, 70):
        x, logits = batch(num_tokens, layer.hidden, dtype)
        for renormalize, activation in ((True, "silu"), (False, "gelu_tanh")):
            spec = dataclasses.replace(SPEC, renormalize=renormalize, activation=activation)
            found = native.moe(x, logits, ours, spec)  # type: ignore[arg-type]
            exact = oracle.moe(x.float(), logits.float(), theirs, spec)  # type: ignore[arg-type]
            assert found.dtype is dtype
            tolerance = 1e-5 if dtype is torch.float32 else 2e-2 if layer.encoding == "F32" else 4e-2  # 8-bit rows
            torch.testing.assert_close(found.float(), exact, rtol=tolerance, atol=tolerance)


@everywhere
@both
@pytest.mark.parametrize("encoding", ["F32", "Q8_0"])
def test_a_token_is_the_same_alone_and_among_others(
    isa: str, dtype: torch.dtype, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(96, 64, encoding)
    one, two = (backend_of(isa, dtype, threads, monkeypatch) for threads in (1, 2))
    packed_one, packed_two = layer.packed(one), layer.packed(two)
    x, logits = batch(131, layer.hidden, dtype)
    together = two.moe(x, logits, packed_two, SPEC)  # type: ignore[arg-type]
    for size in (1, 7, 40):
        parts = [
            one.moe(x[at : at + size], logits[at : at + size], packed_one, SPEC)  # type: ignore[arg-type]
            for at in range(0, 131, size)
        ]
        assert torch.equal(torch.cat(parts), together)
    order = torch.randperm(131)
    assert torch.equal(two.moe(x[order], logits[order], packed_two, SPEC), together[order])  # type: ignore[arg-type]


@everywhere
def test_equal_logits_choose_the_first_and_a_nan_stays_with_its_token(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = Layer(64, 48)
    native, oracle = backend_of(isa, torch.float32, 2, monkeypatch), ReferenceBackend(CPU, torch.float32)
    packed, theirs = layer.packed(native), layer.packed(oracle)
    x, logits = batch(20, 64, torch.float32)
    logits[3] = 0.5
    logits[5, 2] = torch.nan
    found = native.moe(x, logits, packed, SPEC)  # type: ignore[arg-type]
    assert found[5].isnan().all()
    assert not found[torch.arange(20) != 5].isnan().any()
    chosen = torch.full((1, NUM_EXPERTS), -30.0)
    chosen[0, :3] = 0.5
    torch.testing.assert_close(found[3:4], oracle.moe(x[3:4], chosen, theirs, SPEC), rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


def test_experts_of_other_shapes_or_numbers_are_refused() -> None:
    native = CpuBackend(CPU, torch.float32, 1)
    with pytest.raises(ValueError, match="one shape"):
        native.pack_experts([[Weight(0, 32, 64)], [Weight(1, 32, 32)]], [Weight(2, 64, 16), Weight(3, 64, 16)])
    packed = native.pack_experts([[Weight(0, 32, 64)]], [Weight(2, 64, 16)])
    x, logits = batch(2, 64, torch.float32)
    with pytest.raises(ValueError, match="where 1 are packed"):
        native.moe(x, logits, packed, SPEC)


def test_quantised_experts_stay_quantised() -> None:
    native = CpuBackend(CPU, torch.bfloat16, 1)
    small, large = (Layer(64, 64, encoding).packed(native) for encoding in ("Q4_0", "BF16"))
    assert small.nbytes < 0.4 * large.nbytes  # type: ignore[attr-defined]
