"""RoPE's settings from config.json, as transformers 4 and 5 write them. Torch-free.

transformers 5 keeps everything in rope_parameters; 4 has rope_theta at the top and the rest in rope_scaling.
"""

from __future__ import annotations

import math

from ..spec import RopeSpec
from .hf_config import HfConfig

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def read_rope(config: HfConfig, head_dim: int, *, su_is_longrope: bool = False) -> RopeSpec:
    """Of a model whose layers all rotate alike. `su_is_longrope`: older configs of the family call longrope "su" or
    "yarn"."""
    scaling = _scaling(config)
    if _is_nested(scaling):
        config.fail("RoPE differs between layers, which is not supported")
    return _read_one(config, scaling, head_dim, config.number("rope_theta", 10000.0), su_is_longrope)


def read_two_ropes(config: HfConfig, head_dim: int) -> tuple[RopeSpec, RopeSpec]:
    """(of the layers that attend to everything, of those with a window), where a family has both."""
    scaling = _scaling(config)
    theta, local_theta = config.number("rope_theta", 1e6), config.number("rope_local_base_freq", 1e4)
    if not _is_nested(scaling):
        local = HfConfig(config.path, {})
        return (
            _read_one(config, scaling, head_dim, theta),
            _read_one(config, local, head_dim, local_theta),
        )
    full, local = (
        scaling.section(kind) or HfConfig(config.path, {}) for kind in ("full_attention", "sliding_attention")
    )
    return _read_one(config, full, head_dim, theta), _read_one(config, local, head_dim, local_theta)


def _scaling(config: HfConfig) -> HfConfig:
    return config.section("rope_parameters") or config.section("rope_scaling") or HfConfig(config.path, {})


def _is_nested(scaling: HfConfig) -> bool:
    """A rope_parameters whose values are objects again holds one set for each kind of layer."""
    return any(isinstance(value, dict) for value in scaling.values.values())


def _read_one(
    config: HfConfig, scaling: HfConfig, head_dim: int, default_theta: float, su_is_longrope: bool = False
) -> RopeSpec:
    theta = scaling.positive("rope_theta", default_theta)
    fraction = scaling.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * fraction)
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        config.fail(f"RoPE covers {rotary_dim} of {head_dim} dimensions", "download the model again")
    kind = scaling.values.get("rope_type", scaling.values.get("type")) or "default"
    if su_is_longrope and kind in ("su", "yarn"):
        kind = "longrope"
    if kind not in _KINDS:
        config.fail(f"the RoPE type {str(kind)[:40]!r} is not supported ({', '.join(_KINDS)} are)")
    if kind == "default":
        return RopeSpec(theta=theta, rotary_dim=rotary_dim)
    original = _original_positions(config, scaling, kind)
    if kind in ("yarn", "longrope"):
        # Where no factor is given, it is what the positions say.
        default_factor = config.integer("max_position_embeddings", original) / original
        factor = scaling.positive("factor", default_factor)
    else:
        factor = scaling.positive("factor", 1.0)
    if kind == "linear":
        return RopeSpec(theta=theta, rotary_dim=rotary_dim, kind="linear", factor=factor)
    if kind == "dynamic":
        if rotary_dim < 4:
            config.fail(f"RoPE of the type 'dynamic' needs more than {rotary_dim} dimensions")
        return RopeSpec(
            theta=theta,
            rotary_dim=rotary_dim,
            kind="dynamic",
            factor=factor,
            original_max_position_embeddings=original,
        )
    if kind == "yarn":
        return _yarn(scaling, theta, rotary_dim, factor, original)
    if kind == "longrope":
        return _longrope(scaling, theta, rotary_dim, factor, original)
    return _llama3(scaling, theta, rotary_dim, factor, original)


def _original_positions(config: HfConfig, scaling: HfConfig, kind: str) -> int:
    """Positions of the training before the extension. Phi-3 states them outside the section, and that wins."""
    trained = config.integer("max_position_embeddings", 8192)
    if kind in ("linear", "dynamic"):
        original = trained
    else:
        stated = scaling.integer("original_max_position_embeddings", trained)
        original = config.integer("original_max_position_embeddings", stated)
    if original <= 0:
        config.fail(f"the RoPE was trained for {original} positions", "download the model again")
    return original


def _llama3(scaling: HfConfig, theta: float, rotary_dim: int, factor: float, original: int) -> RopeSpec:
    low, high = scaling.number("low_freq_factor", 1.0), scaling.number("high_freq_factor", 4.0)
    if not 0 < low < high:
        scaling.fail("the llama3 RoPE factors are out of order", "download the model again")
    return RopeSpec(
        theta=theta,
        rotary_dim=rotary_dim,
        kind="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )


def _yarn(scaling: HfConfig, theta: float, rotary_dim: int, factor: float, original: int) -> RopeSpec:
    mscale, mscale_all = scaling.number("mscale", 0.0), scaling.number("mscale_all_dim", 0.0)
    if mscale and mscale_all:
        default = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all)
    else:
        default = _yarn_scale(factor, 1.0)
    return RopeSpec(
        theta=theta,
        rotary_dim=rotary_dim,
        kind="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=scaling.positive("attention_factor", default),
        beta_fast=scaling.number("beta_fast", 0.0) or 32.0,
        beta_slow=scaling.number("beta_slow", 0.0) or 1.0,
        truncate=scaling.values.get("truncate", True) is not False,
    )


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def longrope_attention_factor(factor: float, original: int) -> float:
    """What LongRoPE (Ding et al. 2024) recommends for positions extended by `factor`."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _longrope(scaling: HfConfig, theta: float, rotary_dim: int, factor: float, original: int) -> RopeSpec:
    short, long = scaling.numbers("short_factor"), scaling.numbers("long_factor")
    if not len(short) == len(long) == rotary_dim // 2:
        scaling.fail(
            f"the longrope RoPE has {len(short)} short and {len(long)} long factors for {rotary_dim // 2} frequencies",
            "download the model again",
        )
    return RopeSpec(
        theta=theta,
        rotary_dim=rotary_dim,
        kind="longrope",
        factor=factor,
        original_max_position_embeddings=original,
        factors=short,
        long_factors=long,
        attention_factor=scaling.positive("attention_factor", longrope_attention_factor(factor, original)),
    )
