"""A ModelSpec from a GGUF header. Torch-free."""

from __future__ import annotations

import array
from dataclasses import replace
from typing import Any

from ..spec import ExpertsSpec, ModelError, ModelSpec, with_extended_positions
from .gguf_families import GGUF_FAMILIES, MIXTRAL, GgufFamily
from .gguf_file import END_PIECES, GgufFile
from .gguf_outline import layer_windows
from .gguf_rope import read_local_rope, read_rope
from .outline import checked_num_layers

Fields = dict[str, Any]
"""Fields of ModelSpec, by name."""

_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def gguf_family(file: GgufFile) -> GgufFamily:
    """The table entry for the file's architecture. Raises ModelError listing the supported ones."""
    architecture = file.get("general.architecture", str, "")
    family = GGUF_FAMILIES.get(architecture)
    if architecture == "llama" and file.get("llama.expert_count", int, 0):
        return MIXTRAL
    if family is None:
        known = ", ".join(sorted(GGUF_FAMILIES))
        raise ModelError(
            f"{file.path.name}: the GGUF architecture {architecture[:60]!r} is not supported (supported: {known}); "
            "choose a model of a supported architecture"
        )
    return family


def read_gguf_spec(file: GgufFile) -> ModelSpec:
    """The model's shape. Raises ModelError where the metadata lacks something or asks for what is not implemented."""
    family = gguf_family(file)
    prefix = file.get("general.architecture", str, "")
    for key in family.refused_keys:
        if file.get(f"{prefix}.{key}", int, 0):
            raise ModelError(f"{file.path.name}: {prefix}.{key} is set, which is not supported; choose another model")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{file.path.name}: there is no token_embd.weight matrix; download the whole model again")
    hidden_size = file.require(f"{prefix}.embedding_length")
    num_heads = _uniform(file, f"{prefix}.attention.head_count")
    if hidden_size <= 0 or num_heads <= 0:
        raise ModelError(f"{file.path.name}: embedding_length and head_count must be positive; convert the model again")
    head_dim = file.get(f"{prefix}.attention.key_length", int, hidden_size // num_heads)
    rope = read_rope(file, prefix, head_dim)
    if family.interleaved_query and rope.rotary_dim != head_dim:
        # The rows of q and k are put back in order over whole heads, as llama.cpp permutes them there.
        raise ModelError(
            f"{file.path.name}: RoPE covers {rope.rotary_dim} of {head_dim} dimensions, which is not supported for "
            f"{prefix[:60]}; choose another model"
        )
    vocab_size = embedding.shape[0]
    num_layers = file.require(f"{prefix}.block_count")
    common = ModelSpec(
        architecture=family.architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=_uniform(file, f"{prefix}.feed_forward_length"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=_uniform(file, f"{prefix}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=file.get(f"{prefix}.attention.layer_norm_rms_epsilon", float, 1e-5),
        rope=rope,
        max_position_embeddings=file.require(f"{prefix}.context_length"),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        eos_token_ids=read_eos_ids(file, vocab_size),
        bos_token_id=_token_id(file, "bos_token_id", vocab_size),
        windows=_layer_windows(file, prefix, num_layers),
    )
    return with_extended_positions(replace(common, **_family_fields(file, prefix, common)))


def read_eos_ids(file: GgufFile, vocab_size: int) -> tuple[int, ...]:
    """Every id that ends a turn, without repetition."""
    ids = [_token_id(file, key, vocab_size) for key in _EOS_KEYS]
    pieces = file.strings("tokenizer.ggml.tokens") or []
    ids += [token_id for token_id, piece in enumerate(pieces[:vocab_size]) if piece in END_PIECES]
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def _token_id(file: GgufFile, key: str, vocab_size: int) -> int | None:
    token_id = file.get(f"tokenizer.ggml.{key}", int)
    # Converters write 2³²-1 for "none"; anything outside the vocabulary can never be sampled.
    return token_id if token_id is not None and 0 <= token_id < vocab_size else None


def _uniform(file: GgufFile, key: str, default: int | None = None) -> int:
    """A number that newer files may give per layer; only the same number for all layers is supported."""
    value = file.metadata.get(key)
    if isinstance(value, array.array) and len(value) and len(set(value)) == 1:
        return int(value[0])
    if isinstance(value, array.array):
        raise ModelError(
            f"{file.path.name}: {key} differs between layers, which is not supported; choose another model"
        )
    if value is None and default is not None:
        return default
    return file.require(key)


# ------------------------------------------------------------------ what families add


def _family_fields(file: GgufFile, prefix: str, spec: ModelSpec) -> Fields:
    """Fields of ModelSpec beyond those that all files state alike; what the header leaves out is as llama.cpp has it
    built in."""
    if spec.architecture in ("Gemma2ForCausalLM", "Gemma3ForCausalLM"):
        return _gemma(file, prefix, spec)
    if spec.architecture == "GraniteForCausalLM":
        return _granite(file, prefix, spec)
    if spec.architecture in ("MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM"):
        return {"experts": _experts(file, prefix, spec)}
    return {}


def _gemma(file: GgufFile, prefix: str, spec: ModelSpec) -> Fields:
    # The 27B models scale by the width of a head as if heads shared the hidden size; their depth tells them.
    layers_of_27b = 46 if prefix == "gemma2" else 62
    is_27b = spec.num_hidden_layers == layers_of_27b
    width = spec.hidden_size / spec.num_attention_heads if is_27b else spec.head_dim
    score_cap, logit_cap = (50.0, 30.0) if prefix == "gemma2" else (0.0, 0.0)
    return {
        "activation": "gelu_tanh",
        "attention_scale": width**-0.5,
        "attention_soft_cap": file.get(f"{prefix}.attn_logit_softcapping", float, score_cap),
        "logit_soft_cap": file.get(f"{prefix}.final_logit_softcapping", float, logit_cap),
        "embedding_scale": spec.hidden_size**0.5,
        "local_rope": read_local_rope(file, prefix, spec.rope) if prefix == "gemma3" else None,
    }


def _granite(file: GgufFile, prefix: str, spec: ModelSpec) -> Fields:
    scales = {
        name: file.get(f"{prefix}.{key}", float, 0.0)
        for name, key in (
            ("embedding_scale", "embedding_scale"),
            ("residual_scale", "residual_scale"),
            ("attention_scale", "attention.scale"),
            ("logit_scale", "logit_scale"),
        )
    }
    # 0 and absent mean the same: as in a Llama.
    fields: Fields = {name: scale for name, scale in scales.items() if scale}
    if "logit_scale" in fields:
        fields["logit_scale"] = 1.0 / fields["logit_scale"]
    return fields


def _experts(file: GgufFile, prefix: str, spec: ModelSpec) -> ExpertsSpec:
    num_experts, chosen = file.require(f"{prefix}.expert_count"), file.require(f"{prefix}.expert_used_count")
    size = file.get(f"{prefix}.expert_feed_forward_length", int, spec.intermediate_size)
    if not 0 < chosen <= num_experts <= 1 << 16 or size <= 0:
        raise ModelError(
            f"{file.path.name}: {chosen} of {num_experts} experts of size {size} make no model; convert it again"
        )
    stated = file.metadata.get(f"{prefix}.expert_weights_norm")
    renormalize = stated if isinstance(stated, bool) else spec.architecture != "OlmoeForCausalLM"
    return ExpertsSpec(
        num_experts=num_experts, num_experts_per_token=chosen, intermediate_size=size, renormalize=renormalize
    )


def _layer_windows(file: GgufFile, prefix: str, num_layers: int) -> tuple[int, ...]:
    """Empty where no layer has one. Raises ModelError where the header does not say which layers have it."""
    windows, notes = layer_windows(file, prefix, checked_num_layers(num_layers, file.path.name))
    if notes:
        raise ModelError(f"{file.path.name}: {notes[0]}, so that it cannot be served; choose another model")
    return tuple(window or 0 for window in windows) if any(windows) else ()
