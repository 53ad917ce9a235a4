"""A model's shape, read from config.json or a GGUF header: everything needed before any weight is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


class ModelError(Exception):
    """The model's files cannot be served. The message is one line: what is wrong, and how to mend it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021), half-split pairing."""

    theta: float = 10000.0
    rotary_dim: int
    kind: Literal["default", "linear", "llama3", "factors"] = "default"
    """llama3: frequencies scaled by wavelength bands; factors: explicit divisors (GGUF's rope_freqs tensor)."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()
    """[rotary_dim / 2], divisors of the inverse frequencies; kind "factors" only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shape of a decoder-only transformer. Field names follow transformers' config.json."""

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
    mlp_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    windows: tuple[int, ...] = ()
    """Keys that a query of each layer sees at most, itself included; 0: all before it. Empty: 0 for all layers."""

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0
