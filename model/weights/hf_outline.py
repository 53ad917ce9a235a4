"""An `Outline` from a config.json of any architecture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..spec import ModelError
from ..text import one_line
from .jsonfile import read_json_object, read_optional_json_object
from .layout import check_spec
from .outline import Outline, Sizes, build_outline, checked_num_layers, periodic_windows
from .safetensors_file import SafetensorsFile
from .safetensors_source import INDEX, weight_files

_FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def read_hf_outline(directory: Path, completed: dict[str, Any]) -> Outline:
    """`completed`: the text model's settings, config.json's own over the defaults of its architecture.

    The parameters are counted where safetensors, or their index, are there and not quantised. Raises ModelError where a
    number is missing, or the layers keep something other than keys and values.
    """
    path = directory / "config.json"
    where = f"{directory.name}/config.json"
    raw = read_json_object(path)
    names = raw.get("architectures")
    architecture = one_line(str(names[0] if isinstance(names, list) and names else raw.get("model_type")), 80)
    _refuse_other_memory(completed, architecture, where)
    values = _Values(completed, where)
    num_layers = checked_num_layers(values.integer("num_hidden_layers"), where)
    heads = values.integer("num_attention_heads")
    hidden_size = values.integer("hidden_size")
    head_dim = values.integer("head_dim", hidden_size // max(1, heads))
    windows = _windows(values, num_layers, where)
    sizes = Sizes(
        architecture=architecture,
        vocab_size=values.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_intermediate_size(values, hidden_size),
        num_attention_heads=heads,
        num_key_value_heads=[_num_key_value_heads(values, heads)] * num_layers,
        key_dims=[head_dim] * num_layers,
        value_dims=[head_dim] * num_layers,
        windows=windows,
        max_position_embeddings=values.integer("max_position_embeddings"),
        tie_word_embeddings=completed.get("tie_word_embeddings") is True,
        num_reading_layers=values.integer("num_kv_shared_layers", 0),
    )
    outline = build_outline(sizes, where, _stored_parameters(directory, raw, sizes.tie_word_embeddings))
    check_spec(outline.spec, path)
    return outline


class _Values:
    """Settings with checked access."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self._where = where

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int:
            raise ModelError(f"{self._where}: {key} should be an integer, not {str(value)[:40]!r}; name another model")
        return value


def _refuse_other_memory(values: dict[str, Any], architecture: str, where: str) -> None:
    if values.get("is_encoder_decoder") is True:
        raise ModelError(f"{where}: {architecture} is an encoder with a decoder; choose a decoder-only model")
    if values.get("kv_lora_rank"):
        raise ModelError(
            f"{where}: {architecture} keeps compressed keys and values (multi-head latent attention), whose size is "
            "not known here; choose another model"
        )
    if any(
        values.get(key)
        for key in ("ssm_cfg", "mamba_d_state", "state_size", "attn_layer_period", "hybrid_override_pattern")
    ):
        raise ModelError(
            f"{where}: layers of {architecture} keep a state instead of keys and values, whose size is not known here; "
            "choose a model whose layers all attend"
        )


def _windows(values: _Values, num_layers: int, where: str) -> list[int | None]:
    """The window of each layer: stated for each, by a period, from a layer on, or for all."""
    settings = values.values
    window = settings.get("sliding_window")
    has_window = type(window) is int and window > 0
    kinds = settings.get("layer_types")
    if isinstance(kinds, list):
        if len(kinds) != num_layers:
            raise ModelError(
                f"{where}: layer_types has {len(kinds)} entries for {num_layers} layers; download it again"
            )
        return [_window_of_kind(str(kind), values, where) for kind in kinds]
    if not has_window or settings.get("use_sliding_window") is False:
        return [None] * num_layers
    assert isinstance(window, int)
    period = settings.get("sliding_window_pattern", settings.get("_sliding_window_pattern"))
    if type(period) is int and period >= 0:
        return periodic_windows(num_layers, window, period)
    first = values.integer("max_window_layers", 0) if settings.get("use_sliding_window") is True else 0
    return [window if index >= first else None for index in range(num_layers)]


def _window_of_kind(kind: str, values: _Values, where: str) -> int | None:
    if kind == "full_attention":
        return None
    if kind == "sliding_attention":
        return values.integer("sliding_window")
    if kind == "chunked_attention":
        return values.integer("attention_chunk_size")
    raise ModelError(
        f"{where}: how much memory a layer of the kind {kind[:40]!r} keeps is not known here; choose another model"
    )


def _num_key_value_heads(values: _Values, heads: int) -> int:
    """Falcon and GPT-BigCode say by `multi_query` that all heads share one."""
    if values.values.get("multi_query") is True and values.values.get("new_decoder_architecture") is not True:
        return 1
    return values.integer("num_key_value_heads", values.integer("num_kv_heads", heads))


def _intermediate_size(values: _Values, hidden_size: int) -> int:
    """The widest product of one token: of a dense layer, or of the experts that a token takes together. Where a config
    states none, as GPT-2's does, it is four times the hidden size."""
    dense = max(values.integer(key, 0) for key in ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"))
    used = values.integer("num_experts_per_tok", 0)
    return max(dense, used * values.integer("moe_intermediate_size", dense)) or 4 * hidden_size


def is_quantized(config: dict[str, Any]) -> bool:
    """Whether the stored tensors are packed, so that their elements are not the parameters."""
    return bool(config.get("quantization_config") or config.get("compression_config"))


def stored_bytes(directory: Path) -> int | None:
    """Size of the safetensors as stored: of the files, or as their index has it. None: unknown."""
    try:
        return sum(path.stat().st_size for path in weight_files(directory))
    except (ModelError, OSError):
        return _indexed_bytes(directory)


def _indexed_bytes(directory: Path) -> int | None:
    metadata = read_optional_json_object(directory / INDEX).get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return total if type(total) is int and total > 0 else None


def _stored_parameters(directory: Path, config: dict[str, Any], tied: bool) -> int | None:
    if is_quantized(config):
        return None
    try:
        files = weight_files(directory)
    except ModelError:
        return None
    if all(path.is_file() for path in files):
        return sum(_parameters_of_file(path, tied) for path in files)
    total = _indexed_bytes(directory)
    itemsize = _FLOAT_BYTES.get(str(config.get("dtype", config.get("torch_dtype"))))
    return total // itemsize if total is not None and itemsize is not None else None


def _parameters_of_file(path: Path, tied: bool) -> int:
    file = SafetensorsFile(path)
    try:
        return sum(
            math.prod(entry.shape)
            for entry in file.entries.values()
            if entry.dtype in _FLOATS
            and not entry.name.endswith(".rotary_emb.inv_freq")
            and not (tied and entry.name == "lm_head.weight")
        )
    finally:
        file.close()
