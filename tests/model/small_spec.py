"""The shape of a small model that nobody loads."""

from __future__ import annotations

from octavo.model.spec import ModelSpec, RopeSpec

SPEC = ModelSpec(
    architecture="LlamaForCausalLM",
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope=RopeSpec(rotary_dim=16),
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)
