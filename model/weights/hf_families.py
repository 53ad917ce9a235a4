"""What config.json says about each architecture beyond what all have, and what it leaves to its reader. Torch-free.

A family whose config is Llama's needs no entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..spec import Activation, ExpertsSpec
from .hf_config import HfConfig
from .hf_rope import read_rope, read_two_ropes

Fields = dict[str, Any]
"""Fields of ModelSpec, by name."""


@dataclass(frozen=True, slots=True)
class HfFamily:
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes where config.json has no such key."""
    fields: Callable[[HfConfig, int], Fields] = lambda config, head_dim: {"rope": read_rope(config, head_dim)}
    """(config, head_dim) → the fields that differ from Llama's; `rope` among them."""


def hf_family(architecture: str) -> HfFamily:
    return _FAMILIES.get(architecture, _LLAMA)


_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def read_activation(config: HfConfig) -> Activation:
    key = "hidden_activation" if config.values.get("hidden_activation") is not None else "hidden_act"
    name = config.values.get(key) or "silu"
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        config.fail(f"{key} {str(name)[:40]!r} is not supported ({', '.join(_ACTIVATIONS)} are)")
    return _ACTIVATIONS[name]


# ------------------------------------------------------------------ windows


def _window(config: HfConfig) -> int:
    """sliding_window; 0 where it is null."""
    window = config.integer("sliding_window", 0)
    if window < 0:
        config.fail(f"sliding_window is {window}", "download the model again")
    return window


def _num_layers(config: HfConfig) -> int:
    """Bounded, because lists are made of it before the shape as a whole is checked."""
    num_layers = config.integer("num_hidden_layers")
    if not 0 < num_layers <= 4096:
        config.fail(f"num_hidden_layers is {num_layers}", "download the model again")
    return num_layers


def _uniform_windows(config: HfConfig) -> tuple[int, ...]:
    """The same in all layers."""
    window = _window(config)
    return (window,) * _num_layers(config) if window else ()


def _stated_windows(config: HfConfig, default: Callable[[int], bool]) -> tuple[int, ...]:
    """layer_types, or where it is absent, `default` of each layer's index: whether it has the window."""
    num_layers, window = _num_layers(config), _window(config)
    kinds = config.values.get("layer_types")
    if kinds is None:
        windowed = [default(index) for index in range(num_layers)]
    elif isinstance(kinds, list) and len(kinds) == num_layers:
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                config.fail(f"layers of the kind {str(kind)[:40]!r} are not supported")
        windowed = [kind == "sliding_attention" for kind in kinds]
    else:
        config.fail(f"layer_types should be a list of {num_layers} kinds", "download the model again")
    if any(windowed) and not window:
        config.fail("some layers have a window, but sliding_window is not set", "download the model again")
    return tuple(window if has else 0 for has in windowed) if any(windowed) else ()


def _qwen_windows(config: HfConfig) -> tuple[int, ...]:
    if not config.flag("use_sliding_window"):
        return ()
    first = config.integer("max_window_layers", 28)
    return _stated_windows(config, lambda index: _window(config) > 0 and index >= first)


# ------------------------------------------------------------------ experts


def _experts(config: HfConfig, num_experts: int, size: int, *, renormalize: bool) -> ExpertsSpec:
    chosen = config.integer("num_experts_per_tok")
    if not 0 < chosen <= num_experts or not 0 < size < 1 << 31 or num_experts > 1 << 16:
        config.fail(f"{chosen} of {num_experts} experts of size {size} make no model", "download the model again")
    return ExpertsSpec(
        num_experts=num_experts,
        num_experts_per_token=chosen,
        intermediate_size=size,
        renormalize=renormalize,
        dense_layers=_dense_layers(config),
    )


def _dense_layers(config: HfConfig) -> tuple[int, ...]:
    stated = config.values.get("mlp_only_layers") or []
    step = config.integer("decoder_sparse_step", 1)
    if not isinstance(stated, list) or step < 1:
        config.fail("mlp_only_layers or decoder_sparse_step is no choice of layers", "download the model again")
    return tuple(index for index in range(_num_layers(config)) if index in stated or (index + 1) % step)


# ------------------------------------------------------------------ families


def _mistral(config: HfConfig, head_dim: int) -> Fields:
    return {"rope": read_rope(config, head_dim), "windows": _uniform_windows(config)}


def _mixtral(config: HfConfig, head_dim: int) -> Fields:
    size = config.integer("intermediate_size")
    return {
        **_mistral(config, head_dim),
        "experts": _experts(config, config.integer("num_local_experts"), size, renormalize=True),
    }


def _qwen2(config: HfConfig, head_dim: int) -> Fields:
    return {
        "rope": read_rope(config, head_dim),
        "windows": _qwen_windows(config),
        "attention_bias": True,
        "output_bias": False,
    }


def _qwen3(config: HfConfig, head_dim: int) -> Fields:
    return {"rope": read_rope(config, head_dim), "windows": _qwen_windows(config)}


def _qwen3_moe(config: HfConfig, head_dim: int) -> Fields:
    num_experts = config.integer("num_experts", config.integer("num_local_experts", 128))
    size = config.integer("moe_intermediate_size")
    return {
        "rope": read_rope(config, head_dim),
        "windows": _uniform_windows(config) if config.flag("use_sliding_window") else (),
        "experts": _experts(config, num_experts, size, renormalize=config.flag("norm_topk_prob")),
    }


def _olmoe(config: HfConfig, head_dim: int) -> Fields:
    if config.values.get("clip_qkv") is not None:
        config.fail("clip_qkv is set, which is not supported")
    num_experts = config.integer("num_experts", config.integer("num_local_experts", 64))
    size = config.integer("intermediate_size")
    return {
        "rope": read_rope(config, head_dim),
        "experts": _experts(config, num_experts, size, renormalize=config.flag("norm_topk_prob")),
    }


def _phi3(config: HfConfig, head_dim: int) -> Fields:
    return {"rope": read_rope(config, head_dim, su_is_longrope=True), "windows": _uniform_windows(config)}


def _granite(config: HfConfig, head_dim: int) -> Fields:
    return {
        "rope": read_rope(config, head_dim),
        "attention_scale": config.positive("attention_multiplier", 1.0),
        "embedding_scale": config.positive("embedding_multiplier", 1.0),
        "residual_scale": config.positive("residual_multiplier", 1.0),
        "logit_scale": 1.0 / config.positive("logits_scaling", 1.0),
    }


def _gemma(config: HfConfig) -> Fields:
    """What Gemma 2 and 3 have in common."""
    if config.flag("use_bidirectional_attention"):
        config.fail("use_bidirectional_attention is set, which is not supported")
    return {
        "attention_scale": config.positive("query_pre_attn_scalar", 256.0) ** -0.5,
        "attention_soft_cap": config.number("attn_logit_softcapping", 0.0),
        "logit_soft_cap": config.number("final_logit_softcapping", 0.0),
        "embedding_scale": float(max(1, config.integer("hidden_size"))) ** 0.5,
    }


def _gemma2(config: HfConfig, head_dim: int) -> Fields:
    windows = _stated_windows(config, lambda index: index % 2 == 0)
    return {**_gemma(config), "rope": read_rope(config, head_dim), "windows": windows}


def _gemma3(config: HfConfig, head_dim: int) -> Fields:
    period = config.integer("sliding_window_pattern", config.integer("_sliding_window_pattern", 6))
    if period < 1:
        config.fail(f"sliding_window_pattern is {period}", "download the model again")
    rope, local_rope = read_two_ropes(config, head_dim)
    windows = _stated_windows(config, lambda index: (index + 1) % period != 0)
    return {**_gemma(config), "rope": rope, "local_rope": local_rope, "windows": windows}


_GEMMA_DEFAULTS = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "sliding_window": 4096,
}
_LLAMA = HfFamily()
_FAMILIES: dict[str, HfFamily] = {
    "MistralForCausalLM": HfFamily({"max_position_embeddings": 131072, "sliding_window": 4096}, _mistral),
    "MixtralForCausalLM": HfFamily(
        {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8}
        | {"num_experts_per_tok": 2},
        _mixtral,
    ),
    "Qwen2ForCausalLM": HfFamily({"max_position_embeddings": 32768, "sliding_window": 4096}, _qwen2),
    "Qwen3ForCausalLM": HfFamily({"max_position_embeddings": 32768, "sliding_window": 4096, "head_dim": 128}, _qwen3),
    "Qwen3MoeForCausalLM": HfFamily(
        {"max_position_embeddings": 32768, "sliding_window": 4096, "num_experts_per_tok": 8}
        | {"moe_intermediate_size": 768},
        _qwen3_moe,
    ),
    "OlmoeForCausalLM": HfFamily(
        {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts_per_tok": 8}, _olmoe
    ),
    "Olmo2ForCausalLM": HfFamily({"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}),
    "Phi3ForCausalLM": HfFamily(
        {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}, _phi3
    ),
    "GraniteForCausalLM": HfFamily({}, _granite),
    "Gemma2ForCausalLM": HfFamily(
        _GEMMA_DEFAULTS
        | {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        _gemma2,
    ),
    "Gemma3ForCausalLM": HfFamily(_GEMMA_DEFAULTS | {"max_position_embeddings": 131072}, _gemma3),
}
