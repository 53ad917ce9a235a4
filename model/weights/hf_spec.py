"""A ModelSpec from Hugging Face's config.json, as transformers 4 and 5 write it. Torch-free."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..spec import ModelSpec, RopeSpec, with_extended_positions
from .hf_config import HfConfig
from .hf_families import hf_family, read_activation
from .jsonfile import read_json_object, read_optional_json_object
from .quantized_config import read_quantization


def read_hf_spec(directory: Path, tensor_names: Collection[str] | None) -> ModelSpec:
    """The model's shape. `tensor_names` settles what configs leave out: biases, and whether the head is tied. None,
    where there are no tensors to look at: as transformers' defaults for a Llama have it.

    Raises ModelError where the config lacks something or asks for what is not implemented.
    """
    path = directory / "config.json"
    config = HfConfig(path, read_json_object(path))
    _refuse_unsupported(config)
    family = hf_family(config.architecture)
    config = config.with_defaults(family.defaults)
    hidden_size = config.integer("hidden_size")
    num_heads = config.integer("num_attention_heads")
    if hidden_size <= 0 or num_heads <= 0:
        config.fail("hidden_size and num_attention_heads must be positive", "download the model again")
    head_dim = config.integer("head_dim", hidden_size // num_heads)
    names = tensor_names or ()
    common = ModelSpec(
        architecture=config.architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_hidden_layers=config.integer("num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=RopeSpec(rotary_dim=head_dim),
        max_position_embeddings=config.integer("max_position_embeddings", 2048),
        tie_word_embeddings=_is_tied(config, tensor_names),
        attention_bias=config.flag("attention_bias") or "model.layers.0.self_attn.q_proj.bias" in names,
        output_bias=config.flag("attention_bias") or "model.layers.0.self_attn.o_proj.bias" in names,
        mlp_bias=config.flag("mlp_bias") or "model.layers.0.mlp.up_proj.bias" in names,
        eos_token_ids=read_eos_ids(directory, config.values),
        bos_token_id=first_id(config.values.get("bos_token_id")),
        activation=read_activation(config),
    )
    return with_extended_positions(replace(common, **family.fields(config, head_dim)))


def read_eos_ids(directory: Path, config: dict[str, Any] | None = None) -> tuple[int, ...]:
    """Every id that ends a turn, from generation_config.json and config.json, without repetition."""
    config = read_optional_json_object(directory / "config.json") if config is None else config
    generation = read_optional_json_object(directory / "generation_config.json")
    ids: list[int] = []
    for value in (generation.get("eos_token_id"), config.get("eos_token_id")):
        ids += [item for item in (value if isinstance(value, list) else [value]) if type(item) is int and item >= 0]
    return tuple(dict.fromkeys(ids))


def first_id(value: Any) -> int | None:
    value = value[0] if isinstance(value, list) and value else value
    return value if type(value) is int and value >= 0 else None


def _refuse_unsupported(config: HfConfig) -> None:
    if config.architecture == "unknown":
        config.fail("architectures should name one class", 'add it, e.g. ["LlamaForCausalLM"]')
    read_quantization(config.values, f"{config.path.parent.name}/{config.path.name}")


def _is_tied(config: HfConfig, tensor_names: Collection[str] | None) -> bool:
    if config.flag("tie_word_embeddings") or tensor_names is None:
        return config.flag("tie_word_embeddings")
    has_head = "lm_head.weight" in tensor_names
    if not has_head and config.values.get("tie_word_embeddings") is False:
        config.fail("tie_word_embeddings is false, but there is no lm_head.weight", "download the whole model again")
    return not has_head
