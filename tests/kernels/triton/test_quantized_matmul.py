"""Products with quantised weights, under the interpreter, against the weights that the file's own decoding gives."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.kernels.triton import quantized
from octavo.kernels.triton.quantized import (
    DenseScratch,
    QuantizedEmbedding,
    QuantizedLinear,
    dequantize_rows,
    matmul_config,
    num_splits,
    quantized_matmul,
)
from octavo.kernels.triton.quantized_layout import form_of, pack
from octavo.model.weights import dequantize as decoding
from octavo.model.weights.ggml_types import BLOCK_LAYOUT

CPU = torch.device("cpu")
FLOATS_AT = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Where the fp16 fields of a block are; all its other bits are free."""
BITS_HERE = {
    "Q2_K": 3.125,
    "Q3_K": 4.5625,
    "Q4_0": 4.5,
    "Q4_K": 4.625,
    "Q4_1": 5.0,
    "Q5_0": 8.5,
    "Q5_1": 9.0,
    "Q5_K": 8.625,
    "Q6_K": 8.5625,
    "Q8_0": 8.5,
}
QUANTISED = pytest.mark.parametrize("encoding", FLOATS_AT)


class Weight:
    """A StoredWeight over the file's bytes."""

    name = "w"

    def __init__(self, encoding: str, raw: torch.Tensor) -> None:
        block_size, block_bytes = BLOCK_LAYOUT[encoding]
        self.encoding = encoding
        self.shape = (raw.shape[0], raw.shape[1] // block_bytes * block_size)
        self._raw = raw

    def raw(self) -> torch.Tensor:
        return self._raw

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        values = decoding.dequantize_rows(self._raw, self.encoding, dtype)
        return values.view(-1) if len(self.shape) == 1 else values


def random_weight(encoding: str, num_rows: int, width: int, seed: int = 0) -> Weight:
    """Every bit at random but in the fp16 fields, whose values are finite, of either sign, and below about 1."""
    generator = torch.Generator().manual_seed(seed)
    block_size, block_bytes = BLOCK_LAYOUT[encoding]
    assert width % block_size == 0
    blocks = torch.randint(
        0, 256, (num_rows * width // block_size, block_bytes), dtype=torch.uint8, generator=generator
    )
    for start in FLOATS_AT[encoding]:
        values = torch.randn(blocks.shape[0], 1, generator=generator) / 8
        blocks[:, start : start + 2] = values.half().view(torch.uint8)
    return Weight(encoding, blocks.view(num_rows, -1))


def float_weight(values: torch.Tensor) -> Weight:
    weight = Weight("F32", values.reshape(values.shape[0], -1).view(torch.uint8))
    weight.shape = tuple(values.shape)
    return weight


def width_of(encoding: str, short: int = 96) -> int:
    """Not a multiple of the tile where the encoding allows that."""
    return 512 if BLOCK_LAYOUT[encoding][0] == 256 else short


def assert_product(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """y = x @ weight^T + bias, but for the rounding of sums and of the result."""
    expected = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        expected = expected + bias.double()
    slack = 1e-6 * magnitude + 2 * torch.finfo(y.dtype).eps * expected.abs() + 1e-7
    assert ((y.double() - expected).abs() <= slack).all()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN."""
    plain = torch.empty

    def empty(*args: object, **kwargs: object) -> torch.Tensor:
        tensor: torch.Tensor = plain(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture
def scratch() -> DenseScratch:
    return DenseScratch(CPU, 2**16)


@QUANTISED
def test_values_are_exactly_those_of_the_file(encoding: str) -> None:
    weight = random_weight(encoding, 37, width_of(encoding, short=224))
    before = weight.raw().clone()
    packed = pack([weight], CPU)
    assert torch.equal(weight.raw(), before)
    values = torch.full(weight.shape, float("nan"))
    dequantize_rows(packed, 0, values)
    assert torch.equal(values, weight.dequantize(torch.float32))
    reference = dequantize(weight.raw().numpy(), gguf.GGMLQuantizationType[encoding])
    assert np.array_equal(values.numpy(), reference)
    half = torch.full((5, weight.shape[1]), float("nan"), dtype=torch.float16)
    dequantize_rows(packed, 32, half)
    assert torch.equal(half, weight.dequantize(torch.float16)[32:])


@pytest.mark.parametrize("encoding", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_numbers_come_back(encoding: str) -> None:
    numbers = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    raw = torch.from_numpy(quantize(numbers.numpy(), gguf.GGMLQuantizationType[encoding]))
    values = torch.full((3, 64), float("nan"))
    dequantize_rows(pack([Weight(encoding, raw)], CPU), 0, values)
    step = {"Q4": 1 / 7, "Q5": 1 / 15, "Q8": 1 / 127}[encoding[:2]]
    assert (values - numbers).abs().max() <= numbers.abs().max() * step


@pytest.mark.parametrize("num_rows", [31, 32, 33])
def test_large_matrices_are_repacked_in_pieces(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [random_weight("Q4_K", num_rows, 256, seed=1), random_weight("Q4_K", 3, 256, seed=2)]
    whole = pack(parts, CPU)
    monkeypatch.setattr("octavo.kernels.triton.quantized_layout._STEP_VALUES", 8 * 256)
    pieces = pack(parts, CPU)
    for name in ("words", "scales", "offsets", "scale_units", "offset_units"):
        assert torch.equal(getattr(whole, name), getattr(pieces, name))


@QUANTISED
def test_room_is_what_the_table_says(encoding: str) -> None:
    packed = pack([random_weight(encoding, 128, 256)], CPU)
    assert packed.nbytes * 8 / (128 * 256) == BITS_HERE[encoding]


@QUANTISED
def test_product_with_every_encoding(encoding: str, scratch: DenseScratch, poisoned: None) -> None:
    weight = random_weight(encoding, 67, width_of(encoding), seed=3)
    x = torch.randn(3, weight.shape[1]).half()
    layer = QuantizedLinear([weight], (), CPU, torch.float16, scratch)
    assert_product(layer(x), x, weight.dequantize(torch.float16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 16, 33, 70])
@pytest.mark.parametrize("encoding", ["Q4_1", "Q6_K"])
def test_product_with_any_number_of_rows(
    encoding: str, num_rows: int, dtype: torch.dtype, scratch: DenseScratch, poisoned: None
) -> None:
    weight = random_weight(encoding, 65, 160 if encoding == "Q4_1" else 256, seed=4)
    bias = torch.randn(65)
    # What lies beside x must not be read: even 0 times NaN is NaN.
    around = torch.full((num_rows, weight.shape[1] + 48), float("nan"), dtype=dtype)
    x = around[:, : weight.shape[1]]
    x.copy_(torch.randn(x.shape))
    layer = QuantizedLinear([weight], [float_weight(bias)], CPU, dtype, scratch)
    y = layer(x)
    assert y.shape == (num_rows, 65)
    assert y.dtype == dtype
    assert_product(y, x, weight.dequantize(dtype), bias.to(dtype))


@given(
    encoding=st.sampled_from(sorted(FLOATS_AT)),
    num_rows=st.integers(1, 40),
    num_outputs=st.integers(1, 70),
    blocks=st.integers(1, 9),
    min_split=st.sampled_from([64, 256, 1024]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=8, deadline=None)
def test_product_of_any_shape(
    encoding: str, num_rows: int, num_outputs: int, blocks: int, min_split: int, seed: int
) -> None:
    block_size = BLOCK_LAYOUT[encoding][0]
    weight = random_weight(encoding, num_outputs, block_size * (blocks if block_size == 32 else 1 + blocks % 2), seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((num_rows, weight.shape[1]), generator=generator).half()
    out = torch.full((num_rows, num_outputs + 9), float("nan"), dtype=torch.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "_MIN_SPLIT_VALUES", min_split)
        quantized_matmul(x, pack([weight], CPU), None, out[:, 2 : 2 + num_outputs], matmul_config(x.dtype))
    assert out[:, :2].isnan().all()
    assert out[:, 2 + num_outputs :].isnan().all()
    assert_product(out[:, 2 : 2 + num_outputs], x, weight.dequantize(torch.float16))


@pytest.mark.parametrize("num_rows", [2, 33])
def test_splits_are_added_up(num_rows: int, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "_MIN_SPLIT_VALUES", 128)
    weight = random_weight("Q8_0", 70, 128 * 5 + 32, seed=5)
    packed, config = pack([weight], CPU), matmul_config(torch.float32)
    assert num_splits(packed, config) == 3  # six blocks, at most five splits wanted: two blocks each
    x, bias = torch.randn(num_rows, weight.shape[1]), torch.randn(70)
    out = torch.empty(num_rows, 70)
    quantized_matmul(x, packed, bias, out, config)
    assert_product(out, x, weight.dequantize(torch.float32), bias)


@given(num_outputs=st.integers(1, 300_000), width=st.integers(1, 1000).map(lambda n: 32 * n))
def test_splits_cover_the_inputs_and_none_is_empty(num_outputs: int, width: int) -> None:
    form = form_of("Q4_0")
    assert form is not None
    blocks = -(-width // form.block)
    shape = torch.empty((1, blocks * form.group), device="meta")
    matrix = quantized.PackedMatrix(form, num_outputs, width, shape, shape, None, None, None)
    splits = num_splits(matrix, matmul_config(torch.float16))
    per_split = -(-blocks // splits)
    assert splits >= 1
    assert (splits - 1) * per_split < blocks <= splits * per_split


@pytest.mark.parametrize("num_rows", [5, 70])
def test_parts_of_several_encodings_keep_their_order(num_rows: int, scratch: DenseScratch, poisoned: None) -> None:
    dense = float_weight(torch.randn(9, 256))
    encodings = ["Q4_K", "Q4_K", "Q6_K", "Q8_0", "Q5_0"]
    parts = [random_weight(name, 5 + 2 * index, 256, seed=index) for index, name in enumerate(encodings)]
    parts.insert(3, dense)
    biases = [torch.randn(part.shape[0]) for part in parts]
    layer = QuantizedLinear(parts, [float_weight(bias) for bias in biases], CPU, torch.float16, scratch)
    assert len(layer.parts) == 4  # two of Q4_K; Q6_K; dense; Q8_0 with Q5_0, which takes the same form
    x = torch.randn(num_rows, 256).half()
    weight = torch.cat([part.dequantize(torch.float16) for part in parts])
    y = layer(x)
    dense_at = slice(5 + 7 + 9, 5 + 7 + 9 + 9)
    # Torch's own product of the dense part is its own affair.
    torch.testing.assert_close(
        y[:, dense_at].float(), x.float() @ weight[dense_at].float().T + biases[3], atol=0.1, rtol=0.01
    )
    quantised = torch.ones(y.shape[1], dtype=torch.bool)
    quantised[dense_at] = False
    assert_product(y[:, quantised], x, weight[quantised], torch.cat(biases).half()[quantised])


def test_dense_pieces_fit_the_scratch(poisoned: None) -> None:
    weight = random_weight("Q4_0", 70, 64, seed=6)
    x = torch.randn(quantized.MAX_QUANTIZED_ROWS + 1, 64)
    expected = x @ weight.dequantize(torch.float32).T
    for num_bytes in (33 * 64 * 4, 2**20):
        layer = QuantizedLinear([weight], (), CPU, torch.float32, DenseScratch(CPU, num_bytes))
        torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ValueError, match="does not fit"):
        QuantizedLinear([weight], (), CPU, torch.float32, DenseScratch(CPU, 64 * 4 - 1))


def test_matrices_of_different_inputs_do_not_merge(scratch: DenseScratch) -> None:
    parts = [random_weight("Q4_0", 4, 32), random_weight("Q4_0", 4, 64)]
    with pytest.raises(ValueError, match="cannot be merged"):
        QuantizedLinear(parts, (), CPU, torch.float16, scratch)


@pytest.mark.parametrize("encoding", [*FLOATS_AT, "F32"])
def test_a_table_embeds_and_serves_as_head(encoding: str, scratch: DenseScratch, poisoned: None) -> None:
    table = float_weight(torch.randn(41, 96)) if encoding == "F32" else random_weight(encoding, 41, width_of(encoding))
    packed = QuantizedEmbedding(table, CPU, torch.float16, scratch)
    weight = table.dequantize(torch.float16)
    for ids in ([3, 40, 3, 0], [], [2] * 33 if encoding == "Q4_0" else [40]):
        tokens = torch.tensor(ids, dtype=torch.int64)
        assert torch.equal(packed.embed(tokens), weight[tokens])
    x = torch.randn(2, weight.shape[1]).half()
    torch.testing.assert_close(packed.head(x).float(), x.float() @ weight.float().T, rtol=5e-3, atol=5e-2)
