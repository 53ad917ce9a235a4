"""Codes, scales and zero points to numbers: a weight is (code - zero point) * scale, in fp32, rounded once.

Two orders are in use. *Input-major* (AWQ, GPTQ): codes lie [inputs, outputs], a weight's transpose. *Output-major*
(fp8, compressed-tensors): as the weight itself. Codes below eight bits are packed into int32 words, the first in the
lowest bits; AWQ shuffles the eight of a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from ..spec import ModelError

Parts = Mapping[str, torch.Tensor]
"""The stored tensors of one weight by their role: codes, scales, zeros, groups."""
Decode = Callable[[Parts, torch.Tensor], None]
"""(parts, out [outputs, inputs], any float dtype) → None; writes every element of `out`."""

# Values decoded at a time, below the 32,768 elements at which torch wakes its thread team, and small enough for the
# first caches; see dequantize.py.
_CHUNK_VALUES = 30 * 1024
_CHUNK_INPUTS = 64
"""Of input-major codes: 32, so that codes of any width begin a word, and twice that, so that a write fills a line."""

_AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Where in its word output 0, 1, … of eight lies: AutoAWQ packs them in the order 0, 2, 4, 6, 1, 3, 5, 7."""


def decode_awq(parts: Parts, out: torch.Tensor, *, group_size: int) -> None:
    """codes int32 [inputs, outputs / 8], zeros int32 [groups, outputs / 8], scales float [groups, outputs]."""
    codes = parts["codes"]

    def tile(inputs: slice, outputs: slice) -> torch.Tensor:
        return _awq_codes(codes[inputs, outputs.start // 8 : outputs.stop // 8])

    _decode_input_major(tile, _awq_codes(parts["zeros"]), parts, out, group_size)


def _awq_codes(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, words] → int32 [n, 8 * words]."""
    return ((words.unsqueeze(-1) >> torch.tensor(_AWQ_SHIFTS, dtype=torch.int32)) & 15).flatten(1)


def decode_gptq(parts: Parts, out: torch.Tensor, *, bits: int, zero_offset: int, group_size: int) -> None:
    """codes int32 [inputs * bits / 32, outputs], zeros int32 [groups, outputs * bits / 32], scales float [groups,
    outputs], groups int32 [inputs] (absent: `group_size` inputs after the other). A zero point wraps at 2**bits."""
    codes = parts["codes"]

    def tile(inputs: slice, outputs: slice) -> torch.Tensor:
        words = codes[inputs.start * bits // 32 : inputs.stop * bits // 32, outputs]
        return unpack_words(words, bits, dim=0)

    zeros = unpack_words(parts["zeros"], bits, dim=1)[:, : out.shape[0]]
    _decode_input_major(tile, (zeros + zero_offset) & ((1 << bits) - 1), parts, out, group_size)


def _decode_input_major(
    tile: Callable[[slice, slice], torch.Tensor],
    zeros: torch.Tensor,
    parts: Parts,
    out: torch.Tensor,
    group_size: int,
) -> None:
    """`tile`: (inputs, outputs) → their codes, int32 [inputs, outputs]; zeros int32 [groups, outputs]."""
    num_outputs, num_inputs = out.shape
    scales, zeros = parts["scales"].float(), zeros.float()
    stored = parts.get("groups")
    groups = torch.arange(num_inputs) // group_size if stored is None else _checked_groups(stored, scales.shape[0])
    step = _CHUNK_VALUES // _CHUNK_INPUTS
    for start in range(0, num_inputs, _CHUNK_INPUTS):
        inputs = slice(start, min(start + _CHUNK_INPUTS, num_inputs))
        for first in range(0, num_outputs, step):
            outputs = slice(first, min(first + step, num_outputs))
            values = tile(inputs, outputs).float()
            values.sub_(zeros[:, outputs].index_select(0, groups[inputs]))
            values.mul_(scales[:, outputs].index_select(0, groups[inputs]))
            out[outputs, inputs] = values.t()


def _checked_groups(stored: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Which group each input belongs to, as the file says. int32 [inputs] → int64 [inputs]"""
    if stored.numel() and not 0 <= int(stored.min()) <= int(stored.max()) < num_groups:
        raise ModelError(f"a g_idx names a group outside the {num_groups} that have scales; download the model again")
    return stored.long()


def decode_float8(parts: Parts, out: torch.Tensor, *, block: tuple[int, int]) -> None:
    """codes float8 [outputs, inputs]; scales float, one for each `block` (outputs, inputs)."""
    codes = parts["codes"]
    # A table is four times faster than torch's conversion, and keeps the NaNs.
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    raw = codes.view(torch.uint8)

    def rows(outputs: slice) -> torch.Tensor:
        chunk = raw[outputs]
        return table.index_select(0, chunk.flatten().int()).view(chunk.shape)

    _decode_output_major(rows, None, parts, out, block)


def decode_int8(parts: Parts, out: torch.Tensor, *, block: tuple[int, int]) -> None:
    """codes int8 [outputs, inputs]; scales float, one for each `block`; zeros int8 like them, if any; groups int32
    [inputs], if any."""
    codes = parts["codes"]
    _decode_output_major(lambda outputs: codes[outputs].float(), parts.get("zeros"), parts, out, block)


def decode_packed(parts: Parts, out: torch.Tensor, *, bits: int, block: tuple[int, int]) -> None:
    """codes int32 [outputs, inputs * bits / 32, rounded up], of signed numbers with 2**(bits - 1) added; scales and
    groups as in `decode_int8`; zeros, if any, int8, or int32 packed likewise along the outputs."""
    codes, zeros, offset = parts["codes"], parts.get("zeros"), 1 << (bits - 1)
    if zeros is not None and zeros.dtype == torch.int32:
        zeros = unpack_words(zeros, bits, dim=0)[: out.shape[0]] - offset

    def rows(outputs: slice) -> torch.Tensor:
        return (unpack_words(codes[outputs], bits, dim=1)[:, : out.shape[1]] - offset).float()

    _decode_output_major(rows, zeros, parts, out, block)


def _decode_output_major(
    rows: Callable[[slice], torch.Tensor],
    zeros: torch.Tensor | None,
    parts: Parts,
    out: torch.Tensor,
    block: tuple[int, int],
) -> None:
    """`rows`: outputs → their codes, fp32 [outputs, inputs], fresh; zeros like scales [blocks down, blocks across]."""
    num_outputs, num_inputs = out.shape
    scales = _grid(parts["scales"]).float()
    groups = parts.get("groups")
    # Filled with -1 it was never set.
    across = None if groups is None or -1 in groups else _checked_groups(groups, scales.shape[1])

    def spread(grid: torch.Tensor) -> torch.Tensor:
        """[n, blocks across] → [n, inputs], or [n, 1] where all inputs share one."""
        if grid.shape[1] == 1:
            return grid
        if across is not None:
            return grid.index_select(1, across)
        return grid.unsqueeze(-1).expand(-1, -1, block[1]).flatten(1)[:, :num_inputs]

    step = max(1, _CHUNK_VALUES // num_inputs)
    for start in range(0, num_outputs, step):
        stop = min(start + step, num_outputs)
        down = torch.arange(start, stop) // block[0]
        values = rows(slice(start, stop))
        if zeros is not None:
            values.sub_(spread(_grid(zeros).index_select(0, down).float()))
        values.mul_(spread(scales.index_select(0, down)))
        out[start:stop] = values


def _grid(stored: torch.Tensor) -> torch.Tensor:
    """Scales or zero points, stored with two dimensions, or one down the outputs, or none. [down, across]"""
    return stored.reshape(-1, 1) if stored.dim() < 2 else stored


def unpack_words(words: torch.Tensor, bits: int, *, dim: int) -> torch.Tensor:
    """Unsigned codes of `bits` bits, one after the other from the lowest bit of the first word on, along `dim`.

    int32 [n, m] → int32, with 32 / bits times as many along `dim`, and what is left of the last words. Codes of three
    bits straddle words: 32 of them fill three.
    """
    period = 1 if 32 % bits == 0 else bits
    starts = torch.arange(32 * period // bits, dtype=torch.int32) * bits
    index, shift = starts // 32, starts % 32
    trailing = (-1, 1) if dim == 0 else (-1,)
    if words.shape[dim] % period:  # the last codes do not fill theirs
        padding = (0, -words.shape[dim] % period)
        words = F.pad(words, padding if dim == 1 else (0, 0, *padding))
    shape = (-1, period, words.shape[1]) if dim == 0 else (words.shape[0], -1, period)
    periods = words.reshape(shape)
    mask = (1 << bits) - 1
    if period == 1:
        return ((periods >> shift.view(trailing)) & mask).flatten(dim, dim + 1)
    # int32 shifts copy the sign down, so what comes from the upper end of a word is masked before the rest joins it.
    num_low = (32 - shift).clamp(max=bits)
    low = (periods.index_select(dim + 1, index) >> shift.view(trailing)) & ((1 << num_low) - 1).view(trailing)
    following = periods.index_select(dim + 1, (index + 1).clamp(max=period - 1))
    high = (following << num_low.view(trailing)) & mask
    is_split = (num_low < bits).view(trailing)
    return torch.where(is_split, low | high, low).flatten(dim, dim + 1)
