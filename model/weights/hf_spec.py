"""A ModelSpec from Hugging Face's config.json, as transformers 4 and 5 write it. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from ..spec import ModelError, ModelSpec, RopeSpec
from ..text import one_line
from .jsonfile import read_json_object, read_optional_json_object


class _Config:
    """config.json with checked access: a field of the wrong type is a ModelError, not a surprise later."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    def fail(self, what: str, mend: str = "choose another model") -> NoReturn:
        raise ModelError(f"{self.path.parent.name}/{self.path.name}: {what}; {mend}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            self.fail(
                f"{key} is missing (architecture {self.architecture})", "check that the architecture is supported"
            )
        if type(value) is not int:
            self.fail(f"{key} should be an integer, not {str(value)[:40]!r}", "download the model again")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value):
            self.fail(f"{key} should be a number, not {str(value)[:40]!r}", "download the model again")
        return float(value)

    def flag(self, key: str) -> bool:
        return self.values.get(key) is True

    def section(self, key: str) -> _Config | None:
        """A nested object, None where absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(f"{key} should be an object", "download the model again")
        return _Config(self.path, value)

    @property
    def architecture(self) -> str:
        names = self.values.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
            return "unknown"
        return one_line(names[0], 80)


def read_hf_spec(directory: Path, tensor_names: Collection[str] | None) -> ModelSpec:
    """The model's shape. `tensor_names` settles what configs leave out: biases, and whether the head is tied. None,
    where there are no tensors to look at: as transformers' defaults for a Llama have it.

    Raises ModelError where the config lacks something or asks for what is not implemented.
    """
    path = directory / "config.json"
    config = _Config(path, read_json_object(path))
    _refuse_unsupported(config)
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    if hidden_size <= 0 or num_heads <= 0:
        config.fail("hidden_size and num_attention_heads must be positive", "download the model again")
    head_dim = config.integer("head_dim", hidden_size // num_heads)
    return ModelSpec(
        architecture=config.architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_hidden_layers=config.integer("num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=_read_rope(config, head_dim),
        max_position_embeddings=_max_positions(config),
        tie_word_embeddings=_is_tied(config, tensor_names),
        attention_bias=config.flag("attention_bias") or "model.layers.0.self_attn.q_proj.bias" in (tensor_names or ()),
        mlp_bias=config.flag("mlp_bias") or "model.layers.0.mlp.up_proj.bias" in (tensor_names or ()),
        eos_token_ids=read_eos_ids(directory, config.values),
        bos_token_id=_first_id(config.values.get("bos_token_id")),
    )


def read_eos_ids(directory: Path, config: dict[str, Any] | None = None) -> tuple[int, ...]:
    """Every id that ends a turn, from generation_config.json and config.json, without repetition."""
    config = read_optional_json_object(directory / "config.json") if config is None else config
    generation = read_optional_json_object(directory / "generation_config.json")
    ids: list[int] = []
    for value in (generation.get("eos_token_id"), config.get("eos_token_id")):
        ids += [item for item in (value if isinstance(value, list) else [value]) if type(item) is int and item >= 0]
    return tuple(dict.fromkeys(ids))


def _first_id(value: Any) -> int | None:
    value = value[0] if isinstance(value, list) and value else value
    return value if type(value) is int and value >= 0 else None


def _refuse_unsupported(config: _Config) -> None:
    if config.architecture == "unknown":
        config.fail("architectures should name one class", 'add it, e.g. ["LlamaForCausalLM"]')
    for key in ("quantization_config", "compression_config"):
        if config.values.get(key):
            config.fail(f"the checkpoint is quantised ({key})", "use the unquantised model, or a GGUF file of it")
    activation = config.values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        config.fail(f"hidden_act {str(activation)[:40]!r} is not supported (silu is)")


def _is_tied(config: _Config, tensor_names: Collection[str] | None) -> bool:
    if config.flag("tie_word_embeddings") or tensor_names is None:
        return config.flag("tie_word_embeddings")
    has_head = "lm_head.weight" in tensor_names
    if not has_head and config.values.get("tie_word_embeddings") is False:
        config.fail("tie_word_embeddings is false, but there is no lm_head.weight", "download the whole model again")
    return not has_head


def _max_positions(config: _Config) -> int:
    positions = config.integer("max_position_embeddings", 2048)
    window = config.values.get("sliding_window")
    if type(window) is not int or window <= 0 or config.values.get("use_sliding_window") is False:
        return positions
    # Up to the window's length, windowed attention is full attention; beyond it this model would compute otherwise.
    return min(positions, window)


def _read_rope(config: _Config, head_dim: int) -> RopeSpec:
    """transformers 5 keeps everything in rope_parameters; 4 has rope_theta at the top and the rest in rope_scaling."""
    scaling = config.section("rope_parameters") or config.section("rope_scaling") or _Config(config.path, {})
    # A rope_parameters whose values are objects again holds one set for each kind of layer.
    if any(isinstance(value, dict) for value in scaling.values.values()):
        config.fail("RoPE differs between layers, which is not supported")
    theta = scaling.number("rope_theta", config.number("rope_theta", 10000.0))
    fraction = scaling.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * fraction)
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        config.fail(f"RoPE covers {rotary_dim} of {head_dim} dimensions", "download the model again")
    kind = scaling.values.get("rope_type", scaling.values.get("type")) or "default"
    if kind == "default":
        return RopeSpec(theta=theta, rotary_dim=rotary_dim)
    if kind not in ("linear", "llama3"):
        config.fail(f"the RoPE type {str(kind)[:40]!r} is not supported (default, linear and llama3 are)")
    factor = scaling.number("factor", 1.0)
    if not factor > 0:
        config.fail(f"the RoPE scaling factor is {factor}", "download the model again")
    if kind == "linear":
        return RopeSpec(theta=theta, rotary_dim=rotary_dim, kind="linear", factor=factor)
    low, high = scaling.number("low_freq_factor", 1.0), scaling.number("high_freq_factor", 4.0)
    original = scaling.integer("original_max_position_embeddings", config.integer("max_position_embeddings", 8192))
    if not 0 < low < high or original <= 0:
        config.fail("the llama3 RoPE factors are out of order", "download the model again")
    return RopeSpec(
        theta=theta,
        rotary_dim=rotary_dim,
        kind="llama3",
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
    )
