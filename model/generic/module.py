"""transformers' module of an architecture, without memory behind its parameters."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from ..spec import ModelError
from .attention import NAME

_OLDEST = (5, 0)
_QUANTIZATION = ("quantization_config", "compression_config")
"""Read by our own source, which hands out weights dequantised."""


class Unserved(Exception):
    """Why the generic path cannot serve an architecture: the second half of a sentence."""


def model_class(architecture: str, values: dict[str, Any]) -> Any:
    """transformers' class, if it is a causal language model whose attention can be replaced. Raises Unserved."""
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < _OLDEST:
        raise Unserved(f"the generic path needs transformers 5, not {transformers.__version__}; upgrade it")
    found = getattr(transformers, architecture, None) if architecture.isidentifier() else None
    kind = values.get("model_type")
    if found is None or not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        own_code = "auto_map" in values
        more = ", and code that lies beside the weights is never run" if own_code else ""
        raise Unserved(f"transformers {transformers.__version__} does not know it either{more}")
    if values.get("is_encoder_decoder") is True or getattr(found.config_class, "is_encoder_decoder", False) is True:
        raise Unserved("it is an encoder-decoder; only decoders are served")
    # transformers lists some models of images and sound there too.
    several = architecture.endswith("ForConditionalGeneration") or {"vision_config", "audio_config"} & values.keys()
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or several:
        raise Unserved("it is no causal language model of text alone")
    if getattr(found, "_is_stateful", False):
        raise Unserved("its layers keep a recurrent state instead of keys and values")
    if not found._supports_attention_backend or not found._can_set_attn_implementation():
        raise Unserved("transformers computes its attention in code of its own, which cannot be replaced")
    return found


def read_config(values: dict[str, Any]) -> Any:
    """transformers' configuration from the contents of a config.json. Raises Unserved."""
    logging.set_verbosity_error()  # its advice on settings is for those who write models
    logging.disable_progress_bar()
    plain = {key: value for key, value in values.items() if key not in _QUANTIZATION}
    try:
        return transformers.CONFIG_MAPPING[values["model_type"]].from_dict(plain)
    except Exception as error:
        raise Unserved(f"transformers does not accept its config: {_first_line(error)}") from None


def build_module(architecture: str, config_json: str, dtype: torch.dtype) -> Any:
    """The module on the meta device, in evaluation mode, its attention ours. Raises ModelError."""
    values = json.loads(config_json)
    try:
        found = model_class(architecture, values)
        config = read_config(values)
    except Unserved as error:
        raise ModelError(f"{architecture} cannot be built: {error}") from None
    config._attn_implementation = NAME
    try:
        with ExitStack() as stack:
            for context in found.get_init_context(dtype, False, False, False):
                stack.enter_context(context)
            module = found(config)
    except Exception as error:
        raise ModelError(
            f"transformers cannot build a {architecture} of this config: {_first_line(error)}; download it again"
        ) from error
    return module.eval()


def count_parameters(module: Any) -> int:
    """Tied ones once."""
    tied = set(module.all_tied_weights_keys)
    return sum(int(parameter.numel()) for name, parameter in module.named_parameters() if name not in tied)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
