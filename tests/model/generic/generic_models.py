"""Tiny seeded models of architectures without a family of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from family_models import COMMON, Family, save_model

MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
GENERIC_CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "afmoe": ("AfmoeForCausalLM", "windows on most layers, experts, gated attention", {}),
    "apertus": ("ApertusForCausalLM", "an activation with parameters", {}),
    "cohere": ("CohereForCausalLM", "parallel blocks, scaled logits", {"logit_scale": 0.25}),
    "cohere2": (
        "Cohere2ForCausalLM",
        "windows with rotary positions, full layers without",
        {"sliding_window": 20, "num_hidden_layers": 5, "logit_scale": 0.25},
    ),
    "deepseek v3": (
        "DeepseekV3ForCausalLM",
        "latent attention, whose values are narrower than its keys, and experts",
        {**MOE, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 24, "qk_rope_head_dim": 16}
        | {"qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 6, "n_group": 1, "topk_group": 1}
        | {"first_k_dense_replace": 1},
    ),
    "exaone4": ("Exaone4ForCausalLM", "norms behind the blocks, windows", {"sliding_window": 20}),
    "glm4": ("Glm4ForCausalLM", "interleaved partial rotary positions", {"head_dim": 16}),
    "gpt2": ("GPT2LMHeadModel", "learned positions, tied head", {}),
    "gpt neox": ("GPTNeoXForCausalLM", "parallel residual, partial rotary positions", {}),
    "nemotron": ("NemotronForCausalLM", "squared ReLU, norms of 1 + w", {}),
    "olmo": ("OlmoForCausalLM", "norms without parameters", {"clip_qkv": 0.5}),
    "olmo3": ("Olmo3ForCausalLM", "windows, norms behind the blocks", {"sliding_window": 20, "num_hidden_layers": 4}),
    "opt": ("OPTForCausalLM", "learned positions from 2 on", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "phi": ("PhiForCausalLM", "parallel blocks, biases", {}),
    "qwen2 moe": (
        "Qwen2MoeForCausalLM",
        "experts, and one for all",
        {**MOE, "num_experts": 6, "shared_expert_intermediate_size": 48, "norm_topk_prob": True},
    ),
    "smollm3": ("SmolLM3ForCausalLM", "every fourth layer without positions", {"num_hidden_layers": 4}),
    "starcoder2": ("Starcoder2ForCausalLM", "a window on all layers, biases", {"sliding_window": 24}),
}
"""Name → transformers' class, what it is here for, and settings beyond the common ones."""


def save_generic(case: str, directory: Path, **changes: Any) -> Family:
    architecture, _, settings = GENERIC_CASES[case]
    model_class = getattr(transformers, architecture)
    return save_model(model_class, model_class.config_class(**{**COMMON, **settings, **changes}), directory)
