"""A ModelSpec from a GGUF header. Torch-free."""

from __future__ import annotations

import array
import struct
from typing import Literal

from ..spec import ModelError, ModelSpec, RopeSpec
from .gguf_families import GGUF_FAMILIES, GgufFamily
from .gguf_file import GgufFile

_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def gguf_family(file: GgufFile) -> GgufFamily:
    """The table entry for the file's architecture. Raises ModelError listing the supported ones."""
    architecture = file.get("general.architecture", str, "")
    family = GGUF_FAMILIES.get(architecture)
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
            raise ModelError(f"{file.path.name}: {prefix}.{key} is set, which is not supported; choose a dense model")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{file.path.name}: there is no token_embd.weight matrix; download the whole model again")
    hidden_size = file.require(f"{prefix}.embedding_length")
    num_heads = _uniform(file, f"{prefix}.attention.head_count")
    if hidden_size <= 0 or num_heads <= 0:
        raise ModelError(f"{file.path.name}: embedding_length and head_count must be positive; convert the model again")
    head_dim = file.get(f"{prefix}.attention.key_length", int, hidden_size // num_heads)
    rope = _read_rope(file, prefix, head_dim)
    if family.interleaved_query and rope.rotary_dim != head_dim:
        # The rows of q and k are put back in order over whole heads, as llama.cpp permutes them there.
        raise ModelError(
            f"{file.path.name}: RoPE covers {rope.rotary_dim} of {head_dim} dimensions, which is not supported for "
            f"{prefix[:60]}; choose another model"
        )
    vocab_size = embedding.shape[0]
    return ModelSpec(
        architecture=family.architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=_uniform(file, f"{prefix}.feed_forward_length"),
        num_hidden_layers=file.require(f"{prefix}.block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=_uniform(file, f"{prefix}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=file.get(f"{prefix}.attention.layer_norm_rms_epsilon", float, 1e-5),
        rope=rope,
        max_position_embeddings=_max_positions(file, prefix),
        tie_word_embeddings="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        eos_token_ids=read_eos_ids(file, vocab_size),
        bos_token_id=_token_id(file, "bos_token_id", vocab_size),
    )


def read_eos_ids(file: GgufFile, vocab_size: int) -> tuple[int, ...]:
    """Every id that ends a turn, without repetition."""
    ids = (_token_id(file, key, vocab_size) for key in _EOS_KEYS)
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


def _max_positions(file: GgufFile, prefix: str) -> int:
    context = file.require(f"{prefix}.context_length")
    window = file.get(f"{prefix}.attention.sliding_window", int, 0)
    # Up to the window's length, windowed attention is full attention; beyond it this model would compute otherwise.
    return min(context, window) if window > 0 else context


def _read_rope(file: GgufFile, prefix: str, head_dim: int) -> RopeSpec:
    rotary_dim = file.get(f"{prefix}.rope.dimension_count", int, head_dim)
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise ModelError(
            f"{file.path.name}: rope.dimension_count is {rotary_dim} for heads of {head_dim}; convert the model again"
        )
    theta = file.get(f"{prefix}.rope.freq_base", float, 10000.0)
    if "rope_freqs.weight" in file.tensors:
        factors = _read_factors(file, rotary_dim)
        return RopeSpec(theta=theta, rotary_dim=rotary_dim, kind="factors", factors=factors)
    scaling = file.get(f"{prefix}.rope.scaling.type", str, "none")
    # Before scaling.type existed, scale_linear alone stood for it.
    factor = file.get(f"{prefix}.rope.scaling.factor", float, 0.0) or file.get(
        f"{prefix}.rope.scale_linear", float, 1.0
    )
    if scaling not in ("none", "linear"):
        raise ModelError(
            f"{file.path.name}: RoPE scaling {scaling[:40]!r} is not supported (none, linear); choose another model"
        )
    legacy = f"{prefix}.rope.scaling.type" not in file.metadata and f"{prefix}.rope.scale_linear" in file.metadata
    kind: Literal["default", "linear"] = "linear" if (scaling == "linear" or legacy) and factor != 1.0 else "default"
    if kind == "linear" and not factor > 0:
        raise ModelError(f"{file.path.name}: the RoPE scaling factor {factor} is not positive; convert the model again")
    return RopeSpec(theta=theta, rotary_dim=rotary_dim, kind=kind, factor=factor if kind == "linear" else 1.0)


def _read_factors(file: GgufFile, rotary_dim: int) -> tuple[float, ...]:
    """The divisors that the converter computed from Llama 3's frequency bands."""
    tensor = file.tensors["rope_freqs.weight"]
    if tensor.encoding != "F32" or tensor.shape != (rotary_dim // 2,):
        raise ModelError(
            f"{file.path.name}: rope_freqs.weight should be F32 of {rotary_dim // 2} values; convert the model again"
        )
    return struct.unpack_from(f"<{rotary_dim // 2}f", file.data, tensor.offset)
