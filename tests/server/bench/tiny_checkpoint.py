"""A tiny seeded Llama as files, for measurements that load a model by its path."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from octavo.model.families.llama import LlamaForCausalLM
from octavo.model.spec import ModelSpec, RopeSpec
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "hidden_act": "silu",
}
SPEC = ModelSpec(
    architecture="LlamaForCausalLM",
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope=RopeSpec(rotary_dim=16),
    max_position_embeddings=256,
    tie_word_embeddings=True,
)


def save_tiny_checkpoint(folder: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator) * 0.2 + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in LlamaForCausalLM.parameters(SPEC)
    }
    save_file(state, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder
