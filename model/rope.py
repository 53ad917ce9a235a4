"""Rotary position embeddings: the table of cosines and sines (Su et al. 2021), with the usual context extensions.

Frequencies are computed as transformers does (modeling_rope_utils), in fp32 and in its order, so that results agree.
Two kinds depend on how long a sequence is: "dynamic" and "longrope". transformers looks at the sequence of the moment,
and takes other frequencies once it has grown; keys in a cache that others share cannot be rotated again. Here it is the
longest sequence that the server allows (max_model_len) that decides, once and for all sequences.
"""

from __future__ import annotations

import math

import torch

from .spec import ModelError, RopeSpec

_TABLE_ROWS = 2**16
"""Rows of the table computed at a time."""


def inverse_frequencies(rope: RopeSpec, max_positions: int = 0) -> torch.Tensor:
    """fp32 [rotary_dim / 2], radians per position; `max_positions`: of the longest sequence."""
    powers = _powers(rope.theta, rope.rotary_dim)
    if rope.kind == "linear":
        return 1.0 / powers / rope.factor
    if rope.kind == "dynamic":
        return 1.0 / _powers(_dynamic_theta(rope, max_positions), rope.rotary_dim)
    if rope.kind == "llama3":
        return _llama3(1.0 / powers, rope)
    if rope.kind == "yarn":
        return _yarn(powers, rope)
    if rope.kind == "longrope":
        is_long = max_positions > rope.original_max_position_embeddings
        return 1.0 / (_divisors(rope.long_factors if is_long else rope.factors, rope) * powers)
    if rope.kind == "factors":
        return 1.0 / powers / _divisors(rope.factors, rope)
    return 1.0 / powers


def _powers(theta: float, rotary_dim: int) -> torch.Tensor:
    """theta^(2i / rotary_dim). fp32 [rotary_dim / 2]"""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    return torch.as_tensor(theta**exponents)


def _divisors(factors: tuple[float, ...], rope: RopeSpec) -> torch.Tensor:
    if len(factors) != rope.rotary_dim // 2:
        raise ModelError(
            f"the model's rope factors have {len(factors)} entries, but its rotary dimension {rope.rotary_dim} needs "
            f"{rope.rotary_dim // 2}; the file is damaged or of an unknown kind"
        )
    return torch.tensor(factors, dtype=torch.float32)


def _dynamic_theta(rope: RopeSpec, max_positions: int) -> float:
    """NTK-aware scaling (u/bloc97, u/emozilla): the base grows with the length, from the trained positions on."""
    trained = rope.original_max_position_embeddings
    growth = rope.factor * max(max_positions, trained) / trained - (rope.factor - 1)
    return float(rope.theta * growth ** (rope.rotary_dim / (rope.rotary_dim - 2)))


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


def _yarn(powers: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """YaRN (Peng et al. 2023): dimensions that turn often are kept, those that turn rarely are interpolated, and a ramp
    leads from the ones to the others."""

    def dimension(turns: float) -> float:
        """Which one makes so many turns over the trained positions."""
        per_turn = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(per_turn) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


def rope_table(rope: RopeSpec, max_positions: int, device: torch.device) -> torch.Tensor:
    """fp32 [max_positions, rotary_dim]: cosines in the first half of the last axis, sines in the second, each times the
    attention factor."""
    frequencies = inverse_frequencies(rope, max_positions)  # [rotary_dim / 2]
    table = torch.empty((max_positions, rope.rotary_dim), dtype=torch.float32, device=device)
    # In parts, so that a long table needs little memory beside itself.
    for start in range(0, max_positions, _TABLE_ROWS):
        part = table[start : start + _TABLE_ROWS]
        positions = torch.arange(start, start + part.shape[0], dtype=torch.float32)
        angles = torch.outer(positions, frequencies)
        part.copy_(torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.attention_factor)
    return table
