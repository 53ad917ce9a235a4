"""A model's shape, read from config.json or a GGUF header: everything needed before any weight is touched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


class ModelError(Exception):
    """The model's files cannot be served. The message is one line: what is wrong, and how to mend it."""


RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "factors"]
Activation = Literal["silu", "gelu_tanh", "gelu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021), half-split pairing. Equal ones share one table."""

    theta: float = 10000.0
    rotary_dim: int
    """The first so many dimensions of a head are rotated."""
    kind: RopeKind = "default"
    """linear and dynamic: positions interpolated; llama3: frequencies scaled by wavelength bands; yarn, longrope: after
    the papers of these names; factors: explicit divisors (GGUF's rope_freqs tensor)."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    """Positions of the training before the extension; for "dynamic" those beyond which it begins."""
    factors: tuple[float, ...] = ()
    """[rotary_dim / 2], divisors of the inverse frequencies. Kind "longrope": of sequences up to
    `original_max_position_embeddings`; kind "factors": of all."""
    long_factors: tuple[float, ...] = ()
    """[rotary_dim / 2], of longer sequences; kind "longrope" only."""
    attention_factor: float = 1.0
    """Cosines and sines are multiplied by it, so that scores grow by its square."""
    beta_fast: float = 32.0
    """Turns over the trained positions above which a frequency is kept; kind "yarn" only."""
    beta_slow: float = 1.0
    """Turns below which it is interpolated in full; kind "yarn" only."""
    truncate: bool = True
    """Whether the edges between those are whole dimensions; kind "yarn" only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """The experts that a token chooses among, in layers that have them (Shazeer et al. 2017)."""

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    """Of one expert."""
    renormalize: bool
    """Whether the weights of the chosen experts are made to sum to 1."""
    dense_layers: tuple[int, ...] = ()
    """Layers with one MLP of `ModelSpec.intermediate_size` instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shape of a decoder-only transformer. Field names follow transformers' config.json.

    What all models of an architecture have in common is not said here but in its family's file.
    """

    architecture: str
    """transformers' class name, e.g. LlamaForCausalLM: the registry's key."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeSpec
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool = False
    """On the projections of queries, keys and values."""
    output_bias: bool = False
    """On the projection behind attention."""
    mlp_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    windows: tuple[int, ...] = ()
    """Keys that a query of each layer sees at most, itself included; 0: all before it. Empty: 0 for all layers."""
    local_rope: RopeSpec | None = None
    """Of the layers with a window. None: the same as of the others."""
    activation: Activation = "silu"
    attention_scale: float | None = None
    """Of the scores. None: 1 / sqrt(head_dim)."""
    attention_soft_cap: float = 0.0
    """Scores s become cap * tanh(s / cap); 0: as they are."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """What a block adds to the residual stream is multiplied by it."""
    logit_scale: float = 1.0
    logit_soft_cap: float = 0.0
    """After the scale. As `attention_soft_cap`."""
    experts: ExpertsSpec | None = None
    transformers_config: str | None = None
    """config.json of a model that transformers' own code computes (model/generic); None: a family here does."""

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0

    def layer_rope(self, layer: int) -> RopeSpec:
        return self.local_rope if self.local_rope is not None and self.window(layer) else self.rope


def with_extended_positions(spec: ModelSpec) -> ModelSpec:
    """YaRN's factor says how many positions the model knows; configs often keep the number of before the extension."""
    if spec.rope.kind != "yarn":
        return spec
    extended = int(spec.rope.factor * spec.rope.original_max_position_embeddings)
    return replace(spec, max_position_embeddings=max(spec.max_position_embeddings, extended))
