"""Rotary position embeddings: the table of cosines and sines (Su et al. 2021), with the usual context extensions."""

from __future__ import annotations

import math

import torch

from .spec import ModelError, RopeSpec

_TABLE_ROWS = 2**16
"""Rows of the table computed at a time."""


def inverse_frequencies(rope: RopeSpec) -> torch.Tensor:
    """fp32 [rotary_dim / 2], radians per position, computed as transformers does so that results agree."""
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
    frequencies = 1.0 / (rope.theta**exponents)  # [rotary_dim / 2]
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    if rope.kind == "factors":
        if len(rope.factors) != frequencies.numel():
            raise ModelError(
                f"the model's rope factors have {len(rope.factors)} entries, but its rotary dimension "
                f"{rope.rotary_dim} needs {frequencies.numel()}; the file is damaged or of an unknown kind"
            )
        return frequencies / torch.tensor(rope.factors, dtype=torch.float32)
    return frequencies


def _llama3(frequencies: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """Llama 3.1's scaling: long wavelengths are divided by `factor`, short ones kept, those between blended."""
    longest = rope.original_max_position_embeddings / rope.low_freq_factor
    shortest = rope.original_max_position_embeddings / rope.high_freq_factor
    wavelengths = 2 * math.pi / frequencies  # [rotary_dim / 2], positions
    scaled = frequencies / rope.factor
    blend = (rope.original_max_position_embeddings / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * scaled + blend * frequencies
    result = torch.where(wavelengths > longest, scaled, frequencies)
    between = (wavelengths <= longest) & (wavelengths >= shortest)
    return torch.where(between, blended, result)


def rope_table(rope: RopeSpec, max_positions: int, device: torch.device) -> torch.Tensor:
    """fp32 [max_positions, rotary_dim]: cosines in the first half of the last axis, sines in the second."""
    frequencies = inverse_frequencies(rope)  # [rotary_dim / 2]
    table = torch.empty((max_positions, rope.rotary_dim), dtype=torch.float32, device=device)
    # In parts, so that a long table needs little memory beside itself.
    for start in range(0, max_positions, _TABLE_ROWS):
        part = table[start : start + _TABLE_ROWS]
        positions = torch.arange(start, start + part.shape[0], dtype=torch.float32)
        angles = torch.outer(positions, frequencies)
        part.copy_(torch.cat((angles.cos(), angles.sin()), dim=-1))
    return table
