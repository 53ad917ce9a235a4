"""A ModelSpec of an architecture that only transformers knows, from config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..registry import is_native
from ..spec import ModelError, ModelSpec, RopeSpec
from ..weights.hf_spec import first_id, read_eos_ids
from ..weights.layout import check_spec
from ..weights.outline import MAX_LAYERS
from ..weights.quantized_config import read_quantization
from .module import Unserved, build_module, model_class, read_config
from .probe import Probe, probe

_LONGEST = 1 << 24
"""Positions; far above any model, far below what would hurt."""


def read_generic_spec(directory: Path, values: dict[str, Any], architecture: str) -> ModelSpec:
    """`values`: of config.json. Builds and runs transformers' module on the meta device, which allocates nothing.

    Raises ModelError, in one line, where the generic path cannot serve the model.
    """
    read_quantization(values, f"{directory.name}/config.json")
    try:
        spec = _describe(directory, values, architecture)
    except Unserved as error:
        if is_native(architecture):
            raise ModelError(
                f"the generic path cannot serve this {architecture}: {error}; leave model-impl out"
            ) from error.__cause__
        raise ModelError(
            f"the model's architecture {architecture} is not supported: it has no native family, and {error}; "
            "choose another model"
        ) from error.__cause__
    check_spec(spec, directory / "config.json")
    return spec


def _describe(directory: Path, values: dict[str, Any], architecture: str) -> ModelSpec:
    model_class(architecture, values)
    config = read_config(values)
    num_layers = _integer(config, "num_hidden_layers", MAX_LAYERS)
    num_positions = _integer(config, "max_position_embeddings", _LONGEST)
    _refuse_other_layers(config)
    _refuse_varying_rope(config)
    config_json = json.dumps(values)
    module = build_module(architecture, config_json, torch.float32)
    if any(isinstance(part, torch.nn.modules.conv._ConvNd) for part in module.modules()):
        raise Unserved("it mixes neighbouring tokens by convolutions as well as by attention")
    found = probe(module, num_positions, num_layers)
    first = _uniform(found)
    windows = tuple(layer.attention.window for layer in found.layers)
    return ModelSpec(
        architecture=architecture,
        vocab_size=found.vocab_size,
        hidden_size=_integer(config, "hidden_size", 1 << 30),
        intermediate_size=_widest_product(module, config),
        num_hidden_layers=num_layers,
        num_attention_heads=first.num_heads,
        num_key_value_heads=first.num_kv_heads,
        head_dim=first.head_dim,
        rms_norm_eps=1e-6,
        rope=RopeSpec(rotary_dim=2),  # the table of `attention.Step.no_rotation`
        max_position_embeddings=num_positions,
        tie_word_embeddings=bool(module.all_tied_weights_keys),
        eos_token_ids=read_eos_ids(directory, values),
        bos_token_id=first_id(values.get("bos_token_id")),
        windows=windows if any(windows) else (),
        attention_scale=first.scale,
        attention_soft_cap=first.soft_cap,
        transformers_config=config_json,
    )


def _integer(config: Any, name: str, limit: int) -> int:
    try:
        value = getattr(config, name, None)
    except Exception:  # configs whose layers differ refuse to answer for all of them
        raise Unserved(f"its layers differ in {name}") from None
    if type(value) is not int or not 0 < value <= limit:
        raise Unserved(f"its config says that {name} is {str(value)[:40]}")
    return value


def _refuse_other_layers(config: Any) -> None:
    for kind in getattr(config, "layer_types", None) or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise Unserved(f"it has layers of the kind {str(kind)[:40]!r}, which paged attention does not know")


def _refuse_varying_rope(config: Any) -> None:
    """Those whose rotation depends on how long the longest sequence of a step is: an answer would depend on who else is
    being served. ("dynamic" begins beyond the positions that the config states, where no sequence gets.)"""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    if any(section.get("rope_type") == "longrope" for section in (parameters, *nested)):
        raise Unserved("its rotary positions are of the type longrope, which changes with the length of a sequence")


def _uniform(found: Probe) -> Any:
    """The attention of all layers, windows aside: they share one pool."""
    kinds = {
        (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.scale, spec.soft_cap)
        for spec in (layer.attention for layer in found.layers)
    }
    if len(kinds) > 1:
        raise Unserved("its layers differ in the shape or the scale of their attention")
    return found.layers[0].attention


def _widest_product(module: Any, config: Any) -> int:
    """Of one token, head and embeddings aside; of a token's experts together. For the estimate of activations."""
    tables = [layer for layer in module.modules() if isinstance(layer, torch.nn.Embedding)]
    outer = {id(layer.weight) for layer in (*tables, module.get_output_embeddings()) if layer is not None}
    chosen = getattr(config, "num_experts_per_tok", None)
    chosen = chosen if type(chosen) is int else 1
    widths = [
        int(max(parameter.shape[-2:])) * (chosen if parameter.dim() == 3 else 1)
        for parameter in module.parameters()
        if parameter.dim() >= 2 and id(parameter) not in outer
    ]
    return max(widths)
