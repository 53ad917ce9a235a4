"""What bench/aot.py compiles: calls of the wrappers in kernels/triton, with the shapes of models that people serve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from octavo.kernels.backend import AttentionSpec, MoeSpec
from octavo.kernels.triton import tuning
from octavo.kernels.triton.decode import DecodeWorkspace, paged_decode
from octavo.kernels.triton.elementwise import add_rms_norm, gated, rms_norm
from octavo.kernels.triton.moe import DenseExperts, moe
from octavo.kernels.triton.prefill import paged_prefill
from octavo.kernels.triton.quantized import dequantize_rows, look_up_rows, matmul_config, quantized_matmul
from octavo.kernels.triton.quantized_layout import PackedMatrix, pack
from octavo.kernels.triton.rope import rope_write
from octavo.kernels.triton.sampling import DrawParameters, draw, penalise


@dataclass(frozen=True, slots=True)
class Shape:
    """What a launch depends on, of a model and of the settings it is served with."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    block: int = 32
    window: int = 0
    soft_cap: float = 0.0
    dtype: str = "bfloat16"
    activation: str = "silu"
    qk_norm: bool = False
    rotary_dim: int = 0
    """0: the whole head."""
    encoding: str = "Q4_K"
    """GGML's name, of quantised weights."""
    num_experts: int = 0
    num_experts_per_token: int = 0
    """Of experts of `intermediate` each."""

    @property
    def spec(self) -> AttentionSpec:
        scale = self.head_dim**-0.5
        return AttentionSpec(self.num_heads, self.num_kv_heads, self.head_dim, scale, self.window, self.soft_cap)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    def tensor(self, *size: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(size, dtype=dtype or self.torch_dtype)

    def integers(self, *size: int) -> torch.Tensor:
        return self.tensor(*size, dtype=torch.int32)

    def layer(self) -> torch.Tensor:
        return self.tensor(4, 2, self.num_kv_heads, self.block, self.head_dim)

    def queries(self, num_tokens: int) -> torch.Tensor:
        """As `rope_write` returns them: a view of the merged projection."""
        qkv = self.tensor(num_tokens, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        return qkv[:, : self.num_heads]


@dataclass(frozen=True, slots=True)
class Batch:
    """What a launch should not depend on: whatever else is being served."""

    rows: int = 5
    splits: int = 7
    table_width: int = 129


ODD = Batch()
"""Nothing to specialise on: neither ones nor multiples of 16. This is what is compiled."""
OTHERS = (Batch(16, 16, 128), Batch(1, 1, 1))


def launch_decode(shape: Shape, batch: Batch, capability: int) -> None:
    config = tuning.decode_config(shape.spec, shape.block, shape.torch_dtype, divmod(capability, 10))
    workspace = DecodeWorkspace.allocate(batch.rows, batch.splits, shape.spec, torch.device("cpu"))
    tables, lens = shape.integers(batch.rows, batch.table_width), shape.integers(batch.rows)
    out = shape.tensor(batch.rows, shape.num_heads * shape.head_dim)
    paged_decode(shape.queries(batch.rows), shape.layer(), tables, lens, out, workspace, shape.spec, config)


def launch_prefill(shape: Shape, batch: Batch, capability: int) -> None:
    config = tuning.prefill_config(shape.spec, shape.block, shape.torch_dtype, divmod(capability, 10))
    tables, lens = shape.integers(batch.rows, batch.table_width), shape.integers(batch.rows)
    starts, (tile_rows, tile_firsts) = shape.integers(batch.rows + 1), shape.integers(2, batch.rows)
    out = shape.tensor(batch.rows, shape.num_heads * shape.head_dim)
    q, layer = shape.queries(batch.rows), shape.layer()
    paged_prefill(q, layer, tables, lens, starts, tile_rows, tile_firsts, out, shape.spec, config)


def launch_rope(shape: Shape, batch: Batch, capability: int) -> None:
    table = shape.tensor(64, shape.rotary_dim or shape.head_dim, dtype=torch.float32)
    positions, slots = (shape.tensor(batch.rows, dtype=torch.int64) for _ in range(2))
    weight = shape.tensor(shape.head_dim)
    norms = (weight, weight, 1e-6) if shape.qk_norm else None
    qkv = shape.tensor(batch.rows, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim)
    rope_write(qkv, table, positions, slots, shape.layer(), shape.spec, norms)


def launch_norms(shape: Shape, batch: Batch, capability: int) -> None:
    x, residual = shape.tensor(batch.rows, shape.hidden), shape.tensor(batch.rows, shape.hidden)
    weight = shape.tensor(shape.hidden)
    rms_norm(x, weight, 1e-6)
    add_rms_norm(x, residual, weight, 1e-6)


def launch_gate(shape: Shape, batch: Batch, capability: int) -> None:
    gated(shape.tensor(batch.rows, 2 * shape.intermediate), shape.activation)


def launch_sampling(shape: Shape, batch: Batch, capability: int) -> None:
    logits = shape.tensor(batch.rows, shape.vocab)
    floats = [shape.tensor(batch.rows, dtype=torch.float32) for _ in range(3)]
    seeds, positions = (shape.tensor(batch.rows, dtype=torch.int64) for _ in range(2))
    top_ks, slots = shape.integers(batch.rows), shape.integers(batch.rows)
    counts, in_prompt = shape.integers(2, shape.vocab), shape.tensor(2, shape.vocab, dtype=torch.bool)
    penalised = penalise(logits, slots, counts, in_prompt, shape.tensor(3, batch.rows, dtype=torch.float32))
    draw(penalised, DrawParameters(floats[0], top_ks, floats[1], floats[2], seeds), positions, truncated=True)


@dataclass(frozen=True, slots=True)
class BlankWeight:
    """A `StoredWeight` of zeros."""

    shape: tuple[int, int]
    encoding: str
    name: str = "blank"

    def raw(self) -> torch.Tensor:
        values, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.encoding]]
        return torch.zeros(self.shape[0], self.shape[1] // values * num_bytes, dtype=torch.uint8)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=dtype)


@cache
def packed_matrix(num_outputs: int, width: int, encoding: str) -> PackedMatrix:
    return pack([BlankWeight((num_outputs, width), encoding)], torch.device("cpu"))


def launch_quantised(shape: Shape, batch: Batch, capability: int) -> None:
    """Products of few rows and of many, which take other tiles, and rows made dense, of a small model's matrix."""
    matrix = packed_matrix(2048, 2048, shape.encoding)
    config = matmul_config(shape.torch_dtype)
    for num_rows in (batch.rows, 48 + batch.rows):
        x, out = shape.tensor(num_rows, matrix.width), shape.tensor(num_rows, matrix.num_outputs)
        quantized_matmul(x, matrix, None, out, config)
    dequantize_rows(matrix, 0, shape.tensor(batch.rows, matrix.width))
    look_up_rows(matrix, shape.tensor(batch.rows, dtype=torch.int64), shape.torch_dtype)


def launch_experts(shape: Shape, batch: Batch, capability: int) -> None:
    """A step of few tokens, and one of as many as take the larger tiles."""
    spec = MoeSpec(shape.num_experts, shape.num_experts_per_token, True, "silu")
    wide, narrow = (2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)
    experts = DenseExperts(*(shape.tensor(shape.num_experts, *size) for size in (wide, narrow)))
    for num_tokens in (batch.rows, batch.rows + 32 * shape.num_experts // shape.num_experts_per_token):
        moe(shape.tensor(num_tokens, shape.hidden), shape.tensor(num_tokens, shape.num_experts), experts, spec)


LAUNCHES: dict[str, Callable[[Shape, Batch, int], None]] = {
    "decode": launch_decode,
    "prefill": launch_prefill,
    "rope": launch_rope,
    "norms": launch_norms,
    "gate": launch_gate,
    "sampling": launch_sampling,
    "quantised": launch_quantised,
    "experts": launch_experts,
}
"""To ship another kernel, add a function that calls its wrapper, and name it in `cases`."""
ATTENTION = ("decode", "prefill")
AROUND = ("rope", "norms", "gate", "sampling")

LLAMA_8B = Shape("Llama-3 8B", 32, 8, 128, 4096, 14336, 128256)
LLAMA_1B = Shape("Llama-3.2 1B", 32, 8, 64, 2048, 8192, 128256)
GEMMA_3 = Shape("Gemma 3 1B", 4, 1, 256, 1152, 6912, 262144, window=512, activation="gelu_tanh", qk_norm=True)
GEMMA_2 = Shape("Gemma 2 9B", 16, 8, 256, 3584, 14336, 256000, window=4096, soft_cap=50.0, activation="gelu_tanh")
QWEN_3_MOE = Shape(
    "Qwen3 30B-A3B", 32, 4, 128, 2048, 768, 151936, qk_norm=True, num_experts=128, num_experts_per_token=8
)
MIXTRAL = replace(LLAMA_8B, name="Mixtral 8x7B", vocab=32000, num_experts=8, num_experts_per_token=2)
OLMOE = Shape("OLMoE 1B-7B", 16, 16, 128, 2048, 1024, 50304, num_experts=64, num_experts_per_token=8)
QUICK = (
    LLAMA_8B,
    LLAMA_1B,
    Shape("SmolLM2 135M", 9, 3, 64, 576, 1536, 49152),
    Shape("Qwen3 8B", 32, 8, 128, 4096, 12288, 151936, qk_norm=True),
    GEMMA_3,
    replace(GEMMA_3, window=0),
)
MORE = (
    Shape("Llama-3 70B", 64, 8, 128, 8192, 28672, 128256),
    Shape("Qwen3 0.6B", 16, 8, 128, 1024, 3072, 151936, qk_norm=True),
    Shape("SmolLM2 1.7B", 32, 32, 64, 2048, 8192, 49152),
    Shape("Llama-2 7B", 32, 32, 128, 4096, 11008, 32000),
    Shape("Phi-2", 32, 32, 80, 2560, 10240, 51200, rotary_dim=32, activation="gelu"),
    Shape("Phi-3 mini", 32, 32, 96, 3072, 8192, 32064),
    Shape("Danube 1.8B", 32, 8, 80, 2560, 6912, 32000, window=4096),
    replace(LLAMA_8B, name="Mistral 7B", window=4096, vocab=32000),
    GEMMA_2,
    replace(GEMMA_2, window=0),
)
"""Every head size, group sizes 1 to 8, windows, soft caps."""
ENCODINGS = ("Q4_K", "Q8_0", "Q4_1", "Q6_K", "Q2_K", "Q3_K")
"""Codes of 2, 4 and 8 bits, with and without offsets and shared floats."""


def cases(quick: bool) -> Iterator[tuple[str, Shape]]:
    """(operator, shape), one axis at a time: not every combination, but every value of head_dim, group, block, window
    and dtype beside the commonest others."""
    for shape in QUICK if quick else (*QUICK, *MORE):
        yield from ((operator, shape) for operator in (*ATTENTION, *AROUND))
    for encoding in ENCODINGS[:2] if quick else ENCODINGS:
        yield "quantised", replace(LLAMA_1B, encoding=encoding)
    yield from (("experts", shape) for shape in ((QWEN_3_MOE,) if quick else (QWEN_3_MOE, MIXTRAL, OLMOE)))
    if quick:
        return
    for shape, block in ((shape, block) for shape in (LLAMA_8B, LLAMA_1B) for block in (16, 64)):
        yield from ((operator, replace(shape, block=block)) for operator in (*ATTENTION, "rope"))
    for shape, dtype in ((shape, dtype) for shape in (LLAMA_8B, LLAMA_1B) for dtype in ("float16", "float32")):
        yield from ((operator, replace(shape, dtype=dtype)) for operator in ATTENTION)
    yield from ((operator, replace(LLAMA_8B, dtype="float32")) for operator in AROUND)
    yield from (("experts", replace(QWEN_3_MOE, dtype=dtype)) for dtype in ("float16", "float32"))
    yield from ((operator, replace(GEMMA_3, window=0, dtype="float32")) for operator in ATTENTION)
