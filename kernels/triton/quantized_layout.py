"""Weights of GGUF files, repacked at load for the kernels of quantized.py.

Every encoding here is affine within a group of 16 or 32 neighbouring inputs: value = (code - zero) * scale + offset,
with a small unsigned code. A file keeps scales, codes and single bits of codes together in blocks of 18 to 210 bytes,
which no wide load can fetch. Here they lie apart:

    words    int32 [outputs, blocks * group]     one word: the codes of 32 / bits groups at the same place within each

             bit  0        4        8             28
                 | code 0 | code 1 | code 2 | … | code 7 |        4 bits, groups of 32: a block is 8 groups, 256 inputs;
                   input j  32 + j   64 + j       224 + j         word j of it holds these

    scales   [blocks * groups per block, outputs]                 so that neighbouring threads read neighbours
    offsets  likewise, where the encoding has them

A shift and a mask on a tile of words give the codes of one group for many outputs, which one vector of scales then
serves. Nothing is rounded. The K-quants' scales are products of a 16-bit float per 256 inputs and a small integer per
group, more bits than a 16-bit float has (as one they would be off by up to 2**-11 of themselves); the factors are kept,
in less room than the product would need in any float.

    bits per weight   Q2_K   Q3_K    Q4_0  Q4_K   Q4_1  Q5_0  Q5_1  Q5_K   Q6_K    Q8_0
    in the file       2.625  3.4375  4.5   4.5    5.0   5.5   6.0   5.5    6.5625  8.5
    here              3.125  4.5625  4.5   4.625  5.0   8.5   9.0   8.625  8.5625  8.5

The layouts in files are ggml's (ggml-common.h, ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..weights import StoredWeight

UNIT_VALUES = 256
"""Inputs that share one float in the K-quants."""
OUTPUT_MULTIPLE = 128
"""Outputs are padded with zeros to a multiple of this, so that kernels load whole tiles."""
_STEP_VALUES = 2**24
"""Weights repacked at a time: bounds what a large matrix needs beside itself."""


@dataclass(frozen=True, slots=True)
class Form:
    """How codes become values. Matrices of one form can lie in one `PackedMatrix`, whatever their encodings."""

    bits: int
    """Bits of a stored code: 2, 4 or 8."""
    group: int
    """Neighbouring inputs that share a scale: 16 or 32."""
    zero: int = 0
    """The code of the value `offset`."""
    has_offset: bool = False
    has_units: bool = False
    """Scales and offsets are int8, and multiply a float of each `UNIT_VALUES` inputs."""

    @property
    def groups_per_block(self) -> int:
        return 32 // self.bits

    @property
    def block(self) -> int:
        """Inputs that share words; divides `UNIT_VALUES`."""
        return self.group * self.groups_per_block


class _Fields(NamedTuple):
    """What n blocks of a file hold."""

    codes: torch.Tensor  # uint8 [n, values per block]
    scales: torch.Tensor  # fp16, or int8 where there are units, [n, groups per block]
    offsets: torch.Tensor | None = None  # like scales
    scale_units: torch.Tensor | None = None  # fp16 [n, 1]
    offset_units: torch.Tensor | None = None  # fp16 [n, 1]


@dataclass(frozen=True, slots=True)
class _Encoding:
    values: int
    """Per block of the file."""
    num_bytes: int
    """Per block of the file."""
    form: Form
    fields: Callable[[torch.Tensor], _Fields]
    """uint8 [n, num_bytes] → what is in it."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix [num_outputs, width] on its device; width is a multiple of form.group. Below, outputs is num_outputs
    padded to `OUTPUT_MULTIPLE`, blocks is width / form.block rounded up, and groups is blocks * form.groups_per_block;
    the padding has the value 0."""

    form: Form
    num_outputs: int
    width: int
    words: torch.Tensor  # int32 [outputs, blocks * form.group]
    scales: torch.Tensor  # fp16 or int8 [groups, outputs]
    offsets: torch.Tensor | None  # like scales
    scale_units: torch.Tensor | None  # fp16 [width / UNIT_VALUES, outputs]
    offset_units: torch.Tensor | None  # likewise

    @property
    def num_blocks(self) -> int:
        return self.words.shape[1] // self.form.group

    @property
    def nbytes(self) -> int:
        tensors = (self.words, self.scales, self.offsets, self.scale_units, self.offset_units)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def form_of(encoding: str) -> Form | None:
    """The form of GGML's encoding of that name; None for one that is kept dense."""
    known = _ENCODINGS.get(encoding)
    return known.form if known is not None else None


def pack(parts: Sequence[StoredWeight], device: torch.device) -> PackedMatrix:
    """Repack matrices of one form and one width, outputs in their order, on `device`."""
    form = _ENCODINGS[parts[0].encoding].form
    num_outputs, width = sum(part.shape[0] for part in parts), parts[0].shape[1]
    packed = _allocate(form, num_outputs, width, device)
    target = 0
    for part in parts:
        encoding = _ENCODINGS[part.encoding]
        raw = part.raw()
        step = max(1, _STEP_VALUES // width)
        for start in range(0, part.shape[0], step):
            rows = raw[start : start + step].to(device)
            fields = encoding.fields(rows.reshape(-1, encoding.num_bytes))
            _write(packed, fields, slice(target, target + rows.shape[0]))
            target += rows.shape[0]
    return packed


def packed_bytes(encoding: str, shape: tuple[int, ...]) -> int:
    """What `pack` makes of one matrix of an encoding that has a form; merged ones share their padding."""
    return _allocate(_ENCODINGS[encoding].form, shape[0], shape[1], torch.device("meta")).nbytes


def _allocate(form: Form, num_outputs: int, width: int, device: torch.device) -> PackedMatrix:
    outputs = -(-num_outputs // OUTPUT_MULTIPLE) * OUTPUT_MULTIPLE
    blocks = -(-width // form.block)

    def zeros(rows: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros((rows, outputs), dtype=dtype, device=device)

    groups = blocks * form.groups_per_block
    step_dtype = torch.int8 if form.has_units else torch.float16
    units = width // UNIT_VALUES if form.has_units else None
    return PackedMatrix(
        form,
        num_outputs,
        width,
        torch.zeros((outputs, blocks * form.group), dtype=torch.int32, device=device),
        zeros(groups, step_dtype),
        zeros(groups, step_dtype) if form.has_offset else None,
        zeros(units, torch.float16) if units is not None else None,
        zeros(units, torch.float16) if units is not None and form.has_offset else None,
    )


def _write(packed: PackedMatrix, fields: _Fields, rows: slice) -> None:
    """Put what whole rows of a file hold to the outputs `rows`."""
    num_rows = rows.stop - rows.start
    packed.words[rows] = _words(fields.codes.view(num_rows, packed.width), packed.form)
    targets = (packed.scales, packed.offsets, packed.scale_units, packed.offset_units)
    for target, source in zip(targets, fields[1:], strict=True):
        if target is not None and source is not None:
            values = source.reshape(num_rows, -1)
            target[: values.shape[1], rows] = values.T


def _words(codes: torch.Tensor, form: Form) -> torch.Tensor:
    """uint8 [num_rows, width] → int32 [num_rows, blocks * group]. Bytes of a word are in little-endian order."""
    num_rows, width = codes.shape
    codes = torch.nn.functional.pad(codes, (0, -width % form.block))
    planes = codes.view(num_rows, -1, 4, 8 // form.bits, form.group)
    bytes_ = planes[:, :, :, 0]  # [num_rows, blocks, 4, group]
    for index in range(1, 8 // form.bits):
        bytes_ = bytes_ | (planes[:, :, :, index] << (index * form.bits))
    return bytes_.transpose(2, 3).contiguous().view(torch.int32).view(num_rows, -1)


def _halves(blocks: torch.Tensor, start: int, count: int = 1) -> torch.Tensor:
    """`count` fp16 fields at byte `start` of every block. fp16 [n, count]."""
    return blocks[:, start : start + 2 * count].contiguous().view(torch.float16)


def _bit_planes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [n, m] → uint8 [n, 8 / bits, m]: the lowest `bits` of every byte, then the next ones."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) >> shifts.view(1, -1, 1)) & ((1 << bits) - 1)


def _nibbles(packed: torch.Tensor, run: int) -> torch.Tensor:
    """uint8 [n, m] → uint8 [n, 2 * m]: of every `run` bytes, all low halves, then all high ones."""
    num_blocks = packed.shape[0]
    return _bit_planes(packed.reshape(-1, run), 4).reshape(num_blocks, -1)


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 4], 32 bits little end first → uint8 [n, 32] holding 0 or 16."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (((packed.unsqueeze(-1) >> shifts) & 1) << 4).view(-1, 32)


def _q4_0(blocks: torch.Tensor) -> _Fields:
    return _Fields(_nibbles(blocks[:, 2:], 16), _halves(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> _Fields:
    return _Fields(_nibbles(blocks[:, 4:], 16), _halves(blocks, 0), _halves(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> _Fields:
    codes = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
    # Moved from around 16 to around 128: Q8_0's form, so that the two can be merged.
    return _Fields(codes + 112, _halves(blocks, 0))


def _q5_1(blocks: torch.Tensor) -> _Fields:
    codes = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return _Fields(codes, _halves(blocks, 0), _halves(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> _Fields:
    # Signed bytes plus 128.
    return _Fields(blocks[:, 2:] ^ 128, _halves(blocks, 0))


def _q2_k(blocks: torch.Tensor) -> _Fields:
    codes = _bit_planes(blocks[:, 16:80].reshape(-1, 32), 2).view(-1, UNIT_VALUES)
    scales, minimums = blocks[:, :16] & 15, blocks[:, :16] >> 4
    return _with_minimums(codes, scales, minimums, _halves(blocks, 80, 2))


def _q3_k(blocks: torch.Tensor) -> _Fields:
    low = _bit_planes(blocks[:, 32:96].reshape(-1, 32), 2).view(-1, UNIT_VALUES)
    high = _bit_planes(blocks[:, :32], 1).view(-1, UNIT_VALUES)
    low_scales = _bit_planes(blocks[:, 96:104], 4).view(-1, 16)
    high_scales = _bit_planes(blocks[:, 104:108], 2).view(-1, 16)
    scales = (low_scales | (high_scales << 4)).view(torch.int8) - 32
    return _Fields(low | (high << 2), scales, None, _halves(blocks, 108))


def _q4_k(blocks: torch.Tensor) -> _Fields:
    scales, minimums = _six_bit_scales(blocks[:, 4:16])
    return _with_minimums(_nibbles(blocks[:, 16:], 32), scales, minimums, _halves(blocks, 0, 2))


def _q5_k(blocks: torch.Tensor) -> _Fields:
    scales, minimums = _six_bit_scales(blocks[:, 4:16])
    high = _bit_planes(blocks[:, 16:48], 1).view(-1, UNIT_VALUES)
    codes = _nibbles(blocks[:, 48:], 32) | (high << 4)
    return _with_minimums(codes, scales, minimums, _halves(blocks, 0, 2))


def _q6_k(blocks: torch.Tensor) -> _Fields:
    low = _nibbles(blocks[:, :128], 64)
    high = _bit_planes(blocks[:, 128:192].reshape(-1, 32), 2).view(-1, UNIT_VALUES)
    return _Fields(low | (high << 4), blocks[:, 192:208].view(torch.int8), None, _halves(blocks, 208))


def _six_bit_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minimums of Q4_K and Q5_K: uint8 [n, 12] → two of uint8 [n, 8]."""
    low_scales, low_minimums, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([low_scales & 63, (high & 15) | ((low_scales >> 2) & 48)], dim=1)
    minimums = torch.cat([low_minimums & 63, (high >> 4) | ((low_minimums >> 2) & 48)], dim=1)
    return scales, minimums


def _with_minimums(codes: torch.Tensor, scales: torch.Tensor, minimums: torch.Tensor, units: torch.Tensor) -> _Fields:
    """Minimums are subtracted; units fp16 [n, 2] are those of scales and minimums."""
    return _Fields(codes, scales.view(torch.int8), minimums.view(torch.int8), units[:, :1], -units[:, 1:])


_ENCODINGS = {
    "Q4_0": _Encoding(32, 18, Form(4, 32, zero=8), _q4_0),
    "Q4_1": _Encoding(32, 20, Form(4, 32, has_offset=True), _q4_1),
    "Q5_0": _Encoding(32, 22, Form(8, 32, zero=128), _q5_0),
    "Q5_1": _Encoding(32, 24, Form(8, 32, has_offset=True), _q5_1),
    "Q8_0": _Encoding(32, 34, Form(8, 32, zero=128), _q8_0),
    "Q2_K": _Encoding(256, 84, Form(2, 16, has_offset=True, has_units=True), _q2_k),
    "Q3_K": _Encoding(256, 110, Form(4, 16, zero=4, has_units=True), _q3_k),
    "Q4_K": _Encoding(256, 144, Form(4, 32, has_offset=True, has_units=True), _q4_k),
    "Q5_K": _Encoding(256, 176, Form(8, 32, has_offset=True, has_units=True), _q5_k),
    "Q6_K": _Encoding(256, 210, Form(8, 16, zero=32, has_units=True), _q6_k),
}
