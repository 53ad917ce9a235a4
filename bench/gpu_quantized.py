"""The kernels over quantised weights, for bench/gpu.py: against the weights that the file's own decoding gives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from gpu_measure import ERROR_LIMITS, Row, Setting, State, attempt, relative_error, time_calls
from octavo.kernels.triton.quantized import dequantize_rows, look_up_rows, matmul_config, quantized_matmul
from octavo.kernels.triton.quantized_layout import PackedMatrix, pack
from octavo.model.weights.dequantize import dequantize_rows as decoded
from octavo.model.weights.ggml_types import BLOCK_LAYOUT

FLOATS_AT = {"Q4_K": (0, 2), "Q8_0": (0,), "Q4_1": (0, 2), "Q6_K": (208,)}
"""Where the fp16 fields of a block are; all its other bits are free."""
ROWS = (1, 64)
"""A single sequence, and the most that are multiplied without making the weights dense."""


@dataclass(frozen=True, slots=True)
class RandomWeight:
    """A `StoredWeight`: every bit at random but in the fp16 fields, which hold values below about 1."""

    shape: tuple[int, int]
    encoding: str
    data: torch.Tensor  # uint8 [outputs, bytes per row]
    name: str = "random"

    @classmethod
    def of(cls, num_outputs: int, width: int, encoding: str, seed: int) -> RandomWeight:
        generator = torch.Generator().manual_seed(seed % 2**63)
        values, num_bytes = BLOCK_LAYOUT[encoding]
        blocks = torch.randint(
            0, 256, (num_outputs * width // values, num_bytes), dtype=torch.uint8, generator=generator
        )
        for start in FLOATS_AT[encoding]:
            scales = torch.randn(len(blocks), 1, generator=generator) / 8
            blocks[:, start : start + 2] = scales.half().view(torch.uint8)
        return cls((num_outputs, width), encoding, blocks.view(num_outputs, -1))

    def raw(self) -> torch.Tensor:
        return self.data

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return decoded(self.data, self.encoding, dtype)


def quantized_cases(state: State) -> Iterator[Row]:
    setting = state.setting
    outputs, width = (70, 256) if setting.dry else (4096, 4096)
    for encoding in ("Q4_K", "Q8_0") if setting.dry or setting.quick else FLOATS_AT:
        if state.clock.left <= 0:
            yield Row("kernels", f"quantised {encoding}", notes=["skipped: out of time"])
            continue
        weight = RandomWeight.of(outputs, width, encoding, setting.seed)
        matrix = pack([weight], setting.device)
        dense = weight.dequantize(torch.float32).to(setting.device).double()
        for dtype in _dtypes(setting, encoding):
            for num_rows in (3,) if setting.dry else ROWS:
                label = f"{encoding} {num_rows} × {width} → {outputs} {str(dtype).removeprefix('torch.')}"
                row = Row("kernels", f"quantised {label}", unit="GB/s")
                yield attempt(row, lambda row, n=num_rows, d=dtype, m=matrix, w=dense: _product(row, state, m, w, n, d))  # type: ignore[misc]
            row = Row("kernels", f"dequantise {encoding} {str(dtype).removeprefix('torch.')}")
            yield attempt(row, lambda row, d=dtype, m=matrix, w=dense: _rows(row, setting, m, w, d))  # type: ignore[misc]


def _dtypes(setting: Setting, encoding: str) -> tuple[torch.dtype, ...]:
    if setting.dry:
        return (torch.float16,)
    return (torch.bfloat16, torch.float16, torch.float32) if encoding == "Q4_K" else (torch.bfloat16,)


def _product(
    row: Row, state: State, matrix: PackedMatrix, dense: torch.Tensor, num_rows: int, dtype: torch.dtype
) -> None:
    setting, config = state.setting, matmul_config(dtype)
    x = torch.randn((num_rows, matrix.width), device=setting.device, generator=setting.generator(num_rows)).to(dtype)
    out = torch.full((num_rows, matrix.num_outputs), math.nan, dtype=dtype, device=setting.device)
    quantized_matmul(x, matrix, None, out, config)
    row.check(relative_error(out, x.double() @ dense.T), ERROR_LIMITS[dtype])
    matrices = [matrix, *(_copy(matrix) for _ in range(setting.num_sets(matrix.nbytes) - 1))]
    timing = time_calls([lambda m=m: quantized_matmul(x, m, None, out, config) for m in matrices], setting)  # type: ignore[misc]
    row.seconds, row.rate = timing.median, matrix.nbytes / timing.median / 1e9
    row.fraction = matrix.nbytes / timing.median / state.ceilings.copy


def _rows(row: Row, setting: Setting, matrix: PackedMatrix, dense: torch.Tensor, dtype: torch.dtype) -> None:
    """All rows in order, and some by their ids, as an embedding looks them up."""
    out = torch.full((matrix.num_outputs, matrix.width), math.nan, dtype=dtype, device=setting.device)
    dequantize_rows(matrix, 0, out)
    ids = torch.randint(0, matrix.num_outputs, (37,), device=setting.device, generator=setting.generator(2))
    found = look_up_rows(matrix, ids, dtype)
    row.check(max(relative_error(out, dense), relative_error(found, dense[ids])), ERROR_LIMITS[dtype])


def _copy(matrix: PackedMatrix) -> PackedMatrix:
    def copied(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.clone()

    return replace(
        matrix,
        words=matrix.words.clone(),
        scales=matrix.scales.clone(),
        offsets=copied(matrix.offsets),
        scale_units=copied(matrix.scale_units),
        offset_units=copied(matrix.offset_units),
    )
