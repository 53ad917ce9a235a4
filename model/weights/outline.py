"""What a model's memory depends on, for architectures that this release need not serve. Torch-free.

Shape and windows only: `spec.rope` and `spec.rms_norm_eps` are not read, since no byte depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..kv_layout import KvLayer, KvLayout, group_layers
from ..spec import ModelError, ModelSpec, RopeSpec

MAX_LAYERS = 4096
"""Far above any model, far below what would hurt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    spec: ModelSpec
    kv_layout: KvLayout
    num_parameters: int | None
    """None where the header does not tell."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The numbers of a header, by transformers' names; lists have an entry per layer."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: Sequence[int]
    key_dims: Sequence[int]
    value_dims: Sequence[int]
    windows: Sequence[int | None]
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_reading_layers: int = 0
    """The last so many layers read the K/V of earlier ones and keep none."""


def checked_num_layers(num_layers: int, where: str) -> int:
    """Raises ModelError for a number that no list should be made of."""
    if not 0 < num_layers <= MAX_LAYERS:
        raise ModelError(f"{where}: the number of layers is {num_layers}; convert or download the model again")
    return num_layers


def build_outline(sizes: Sizes, where: str, num_parameters: int | None, notes: tuple[str, ...] = ()) -> Outline:
    """Raises ModelError where some layer keeps no keys and values: it keeps a state whose size is not known here."""
    if min(sizes.num_key_value_heads) <= 0 or min(sizes.key_dims) <= 0 or min(sizes.value_dims) <= 0:
        raise ModelError(
            f"{where}: some layers of {sizes.architecture} keep a state instead of keys and values, whose size is not "
            "known here; choose a model whose layers all attend"
        )
    num_layers = len(sizes.windows)
    if not 0 <= sizes.num_reading_layers < num_layers:
        raise ModelError(f"{where}: {sizes.num_reading_layers} of {num_layers} layers share K/V; download it again")
    columns = zip(sizes.num_key_value_heads, sizes.key_dims, sizes.value_dims, sizes.windows, strict=True)
    layers = [KvLayer(*column) for column in columns][: num_layers - sizes.num_reading_layers]
    head_dim = max(sizes.key_dims)
    spec = ModelSpec(
        architecture=sizes.architecture,
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=max(sizes.num_key_value_heads),
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        rope=RopeSpec(rotary_dim=head_dim),
        max_position_embeddings=sizes.max_position_embeddings,
        tie_word_embeddings=sizes.tie_word_embeddings,
    )
    return Outline(spec=spec, kv_layout=group_layers(layers), num_parameters=num_parameters, notes=notes)


def periodic_windows(num_layers: int, window: int, period: int) -> list[int | None]:
    """Every `period`-th layer attends to everything, those between to a window. 0: all windowed; 1: none."""
    return [window if period == 0 or index % period < period - 1 else None for index in range(num_layers)]
