"""RoPE's settings from a GGUF header, as llama.cpp reads them. Torch-free."""

from __future__ import annotations

import math
import struct

from ..spec import ModelError, RopeSpec
from .gguf_file import GgufFile
from .hf_rope import longrope_attention_factor

_LONG, _SHORT, _FACTORS = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"


def read_rope(file: GgufFile, prefix: str, head_dim: int) -> RopeSpec:
    """Of the layers without a window. `prefix`: the architecture's. Raises ModelError."""
    rotary_dim = file.get(f"{prefix}.rope.dimension_count", int, head_dim)
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise ModelError(
            f"{file.path.name}: rope.dimension_count is {rotary_dim} for heads of {head_dim}; convert the model again"
        )
    theta = file.get(f"{prefix}.rope.freq_base", float, 10000.0)
    if _FACTORS in file.tensors:
        factors = _read_factors(file, _FACTORS, rotary_dim)
        return RopeSpec(theta=theta, rotary_dim=rotary_dim, kind="factors", factors=factors)
    if _LONG in file.tensors and _SHORT in file.tensors:
        return _longrope(file, prefix, theta, rotary_dim)
    kind = file.get(f"{prefix}.rope.scaling.type", str, "none")
    # Before scaling.type existed, scale_linear alone stood for it.
    factor = file.get(f"{prefix}.rope.scaling.factor", float, 0.0) or file.get(
        f"{prefix}.rope.scale_linear", float, 1.0
    )
    if f"{prefix}.rope.scaling.type" not in file.metadata and f"{prefix}.rope.scale_linear" in file.metadata:
        kind = "linear"
    if kind not in ("none", "linear", "yarn"):
        raise ModelError(
            f"{file.path.name}: RoPE scaling {kind[:40]!r} is not supported (none, linear, yarn); choose another model"
        )
    if not factor > 0:
        raise ModelError(f"{file.path.name}: the RoPE scaling factor {factor} is not positive; convert the model again")
    if kind == "none" or factor == 1.0:
        return RopeSpec(theta=theta, rotary_dim=rotary_dim)
    if kind == "linear":
        return RopeSpec(theta=theta, rotary_dim=rotary_dim, kind="linear", factor=factor)
    return _yarn(file, prefix, theta, rotary_dim, factor)


def read_local_rope(file: GgufFile, prefix: str, rope: RopeSpec) -> RopeSpec:
    """Of the layers with a window, where they rotate otherwise: never scaled."""
    theta = file.get(f"{prefix}.rope.freq_base_swa", float, 10000.0)
    return RopeSpec(theta=theta, rotary_dim=rope.rotary_dim)


def _original_positions(file: GgufFile, prefix: str) -> int:
    trained = file.require(f"{prefix}.context_length")
    original = file.get(f"{prefix}.rope.scaling.original_context_length", int, trained)
    if original < 2:
        raise ModelError(
            f"{file.path.name}: rope.scaling.original_context_length is {original}; convert the model again"
        )
    return original


def _yarn(file: GgufFile, prefix: str, theta: float, rotary_dim: int, factor: float) -> RopeSpec:
    scale = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
    return RopeSpec(
        theta=theta,
        rotary_dim=rotary_dim,
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=_original_positions(file, prefix),
        # What the file states is a factor beside the one that the scaling brings.
        attention_factor=scale * file.get(f"{prefix}.rope.scaling.attn_factor", float, 1.0),
        beta_fast=file.get(f"{prefix}.rope.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=file.get(f"{prefix}.rope.scaling.yarn_beta_slow", float, 1.0),
    )


def _longrope(file: GgufFile, prefix: str, theta: float, rotary_dim: int) -> RopeSpec:
    original = _original_positions(file, prefix)
    factor = file.require(f"{prefix}.context_length") / original
    default = longrope_attention_factor(factor, original)
    return RopeSpec(
        theta=theta,
        rotary_dim=rotary_dim,
        kind="longrope",
        factor=factor,
        original_max_position_embeddings=original,
        factors=_read_factors(file, _SHORT, rotary_dim),
        long_factors=_read_factors(file, _LONG, rotary_dim),
        attention_factor=file.get(f"{prefix}.rope.scaling.attn_factor", float, default),
    )


def _read_factors(file: GgufFile, name: str, rotary_dim: int) -> tuple[float, ...]:
    """Divisors of the frequencies. Small, so they are read here."""
    tensor = file.tensors[name]
    count = rotary_dim // 2
    if tensor.encoding != "F32" or tensor.shape != (count,):
        raise ModelError(
            f"{file.path.name}: {name} is {tensor.encoding} {list(tensor.shape)}, not F32 [{count}]; "
            "convert the model to GGUF again"
        )
    factors: tuple[float, ...] = struct.unpack_from(f"<{count}f", file.data, tensor.offset)
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise ModelError(f"{file.path.name}: {name} holds a factor that is not positive; convert the model again")
    return factors
