"""GGML's block encodings to numbers, vectorised over blocks with torch operations.

The layouts are ggml's (ggml-common.h, ggml-quants.c); the results equal `gguf.quants` bit for bit in fp32, so every
product and sum below keeps the order of the reference and nothing is fused. Encodings without a function here go
through `gguf.quants` itself, which is several times slower.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .ggml_types import BLOCK_LAYOUT

# Blocks are decoded this many values at a time. The fp32 intermediates then stay in the first caches, and every
# operation stays under the 32,768 elements at which torch would wake its thread team: on a busy machine the team's
# barriers cost a hundred times the arithmetic.
_CHUNK_VALUES = 30 * 1024

FLOAT_DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Decoder = Callable[[torch.Tensor, torch.Tensor], None]
"""(blocks uint8 [n, block_bytes], out fp32 [n, block_size]) → None; writes every element of `out`."""


def dequantize_rows(raw: torch.Tensor, encoding: str, dtype: torch.dtype) -> torch.Tensor:
    """Decode whole rows.

    raw: uint8 [num_rows, bytes_per_row], contiguous. Returns `dtype` [num_rows, values_per_row], fresh and contiguous;
    computed in fp32 and rounded once.
    """
    if encoding in FLOAT_DTYPES:
        return raw.view(FLOAT_DTYPES[encoding]).to(dtype, copy=True)
    block_size, block_bytes = BLOCK_LAYOUT[encoding]
    decoder = DECODERS.get(encoding)
    if decoder is None:
        return _dequantize_with_gguf(raw, encoding).to(dtype)
    blocks = raw.reshape(-1, block_bytes)
    num_blocks = blocks.shape[0]
    out = torch.empty((num_blocks, block_size), dtype=dtype)
    step = _CHUNK_VALUES // block_size
    scratch = torch.empty((min(step, num_blocks), block_size)) if dtype != torch.float32 else None
    for start in range(0, num_blocks, step):
        stop = min(start + step, num_blocks)
        target = out[start:stop] if scratch is None else scratch[: stop - start]
        decoder(blocks[start:stop], target)
        if scratch is not None:
            out[start:stop].copy_(target)
    return out.view(raw.shape[0], -1)


def _dequantize_with_gguf(raw: torch.Tensor, encoding: str) -> torch.Tensor:
    """fp32 [num_rows, values_per_row], by the reference implementation in numpy."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType[encoding]))


def _halves(blocks: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """`count` fp16 fields that lie at byte `start` of every block, as fp32 [n, count]."""
    return blocks[:, start : start + 2 * count].contiguous().view(torch.float16).float()


def _q4_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scale = _halves(blocks, 0, 1)
    quants = blocks[:, 2:]
    torch.sub(quants & 15, 8.0, out=out[:, :16])
    torch.sub(quants >> 4, 8.0, out=out[:, 16:])
    out.mul_(scale)


def _q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    fields = _halves(blocks, 0, 2)
    scale, minimum = fields[:, :1], fields[:, 1:]
    quants = blocks[:, 4:]
    torch.mul(quants & 15, scale, out=out[:, :16])
    torch.mul(quants >> 4, scale, out=out[:, 16:])
    out.add_(minimum)


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 4], 32 bits little end first → uint8 [n, 32] holding 0 or 16."""
    shifts = torch.arange(8, dtype=torch.uint8)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return (bits << 4).view(-1, 32)


def _q5_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    scale = _halves(blocks, 0, 1)
    high = _fifth_bits(blocks[:, 2:6])
    quants = blocks[:, 6:]
    torch.sub((quants & 15) | high[:, :16], 16.0, out=out[:, :16])
    torch.sub((quants >> 4) | high[:, 16:], 16.0, out=out[:, 16:])
    out.mul_(scale)


def _q5_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    fields = _halves(blocks, 0, 2)
    scale, minimum = fields[:, :1], fields[:, 1:]
    high = _fifth_bits(blocks[:, 4:8])
    quants = blocks[:, 8:]
    torch.mul((quants & 15) | high[:, :16], scale, out=out[:, :16])
    torch.mul((quants >> 4) | high[:, 16:], scale, out=out[:, 16:])
    out.add_(minimum)


def _q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    torch.mul(blocks[:, 2:].view(torch.int8), _halves(blocks, 0, 1), out=out)


def _k_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Six-bit scales and minimums of Q4_K and Q5_K: uint8 [n, 12] → two of uint8 [n, 8]."""
    low_scales, low_mins, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([low_scales & 63, (high & 15) | ((low_scales >> 2) & 48)], dim=1)
    minimums = torch.cat([low_mins & 63, (high >> 4) | ((low_mins >> 2) & 48)], dim=1)
    return scales, minimums


def _scale_and_shift(quants: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor) -> None:
    """out = scale * quants - minimum for the 8 groups of a Q4_K or Q5_K block; quants uint8 [n, 8, 32]."""
    fields = _halves(blocks, 0, 2)
    scales, minimums = _k_scales(blocks[:, 4:16])
    grouped = out.view(-1, 8, 32)
    torch.mul(quants, (fields[:, :1] * scales).unsqueeze(-1), out=grouped)
    grouped.sub_((fields[:, 1:] * minimums).unsqueeze(-1))


def _q4_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    packed = blocks[:, 16:].view(-1, 4, 1, 32)
    quants = torch.cat([packed & 15, packed >> 4], dim=2)
    _scale_and_shift(quants.view(-1, 8, 32), blocks, out)


def _q5_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    shifts = torch.arange(8, dtype=torch.uint8).view(1, 8, 1)
    high = (blocks[:, 16:48].unsqueeze(1) >> shifts) & 1
    packed = blocks[:, 48:].view(-1, 4, 1, 32)
    low = torch.cat([packed & 15, packed >> 4], dim=2).view(-1, 8, 32)
    _scale_and_shift(low | (high << 4), blocks, out)


def _q6_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    low = blocks[:, :128].view(-1, 2, 1, 64)
    low = torch.cat([low & 15, low >> 4], dim=2).view(-1, 8, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(1, 1, 4, 1)
    high = ((blocks[:, 128:192].view(-1, 2, 1, 32) >> shifts) & 3).view(-1, 8, 32)
    scales = blocks[:, 192:208].view(torch.int8) * _halves(blocks, 208, 1)
    quants = (low | (high << 4)).view(-1, 16, 16)
    grouped = out.view(-1, 16, 16)
    torch.sub(quants, 32.0, out=grouped)
    grouped.mul_(scales.unsqueeze(-1))


DECODERS: dict[str, Decoder] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
