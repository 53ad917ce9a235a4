"""The shapes that a spec implies, so that a file that contradicts itself is refused before the model is built."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..spec import ModelError, ModelSpec


def check_spec(spec: ModelSpec, path: Path) -> None:
    """Raises ModelError where the numbers cannot make a transformer."""
    sizes = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_position_embeddings,
    }
    for field, size in sizes.items():
        if not 0 < size < 1 << 31:
            raise ModelError(f"{path.name}: {field} is {size}; convert or download the model again")
    if spec.num_attention_heads % spec.num_key_value_heads:
        raise ModelError(
            f"{path.name}: {spec.num_attention_heads} attention heads do not divide among {spec.num_key_value_heads} "
            "key-value heads; convert or download the model again"
        )
    if spec.head_dim % 2:
        raise ModelError(f"{path.name}: head_dim {spec.head_dim} is odd; convert or download the model again")
    if not 0 < spec.rms_norm_eps < 1:
        raise ModelError(f"{path.name}: the norm's epsilon is {spec.rms_norm_eps}; convert or download the model again")
    if not 0 < spec.rope.theta < float("inf"):
        raise ModelError(f"{path.name}: RoPE's base is {spec.rope.theta}; convert or download the model again")


def check_shapes(spec: ModelSpec, shapes: Iterable[tuple[str, tuple[int, ...]]], path: Path) -> None:
    """Compare tensors, by canonical name, with the spec. Names that are not a llama-like decoder's are passed over, and
    so are experts: `loader.check_weights` compares every tensor that the family reads."""
    query, key_value = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
    hidden, inner = spec.hidden_size, spec.intermediate_size
    matrices = {
        "embed_tokens": (spec.vocab_size, hidden),
        "lm_head": (spec.vocab_size, hidden),
        "q_proj": (query, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    vectors = ("norm", "input_layernorm", "post_attention_layernorm")
    for name, shape in shapes:
        parts = name.split(".")
        if len(parts) < 2 or "experts" in parts:
            continue
        module, leaf = parts[-2], parts[-1]
        if module in matrices:
            expected = matrices[module] if leaf == "weight" else matrices[module][:1]
        elif module in vectors:
            expected = (hidden,)
        else:
            continue
        if shape != expected:
            raise ModelError(
                f"{path.name}: tensor {name[:100]} is {list(shape)} where the model's shape asks for {list(expected)}; "
                "download the whole model again"
            )
