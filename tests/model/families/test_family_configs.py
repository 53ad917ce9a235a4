"""What config.json says in the ways in which it is found on the hub, and what is refused in one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import save_family
from octavo.model.loader import check_weights
from octavo.model.spec import ModelError, RopeSpec
from octavo.model.weights.hf_spec import read_hf_spec
from octavo.model.weights.safetensors_source import open_safetensors
from safetensors.torch import load_file, save_file

SHAPE: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def write_config(path: Path, architecture: str, **settings: Any) -> Path:
    (path / "config.json").write_text(json.dumps({"architectures": [architecture], **SHAPE, **settings}))
    return path


def test_gemma_3_as_transformers_4_wrote_it(tmp_path: Path) -> None:
    settings = {
        "rope_theta": 1e6, "rope_local_base_freq": 10000.0, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 168, "head_dim": 128,
    }  # fmt: skip
    spec = read_hf_spec(write_config(tmp_path, "Gemma3ForCausalLM", **settings), None)
    assert spec.windows == (512, 512, 512, 512, 512, 0)
    assert spec.layer_rope(5) == RopeSpec(theta=1e6, rotary_dim=128, kind="linear", factor=8.0)
    assert spec.layer_rope(0) == RopeSpec(theta=1e4, rotary_dim=128)
    assert spec.tie_word_embeddings
    assert spec.activation == "gelu_tanh"
    assert spec.attention_scale == 168**-0.5
    assert (spec.attention_soft_cap, spec.logit_soft_cap) == (0.0, 0.0)


def test_gemma_2_leaves_most_to_its_reader(tmp_path: Path) -> None:
    spec = read_hf_spec(write_config(tmp_path, "Gemma2ForCausalLM", hidden_act="gelu_pytorch_tanh"), None)
    assert spec.windows == (4096, 0, 4096, 0, 4096, 0)
    assert (spec.attention_soft_cap, spec.logit_soft_cap, spec.head_dim) == (50.0, 30.0, 256)
    assert spec.embedding_scale == 8.0


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_phi_3_calls_longrope_by_several_names(tmp_path: Path, kind: str) -> None:
    scaling = {"type": kind, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    path = write_config(
        tmp_path, "Phi3ForCausalLM", rope_scaling=scaling, max_position_embeddings=131072,
        original_max_position_embeddings=4096, sliding_window=262144,
    )  # fmt: skip
    rope = read_hf_spec(path, None).rope
    assert (rope.kind, rope.factor, rope.original_max_position_embeddings) == ("longrope", 32.0, 4096)
    assert rope.attention_factor == pytest.approx(1.1902380714)


@pytest.mark.parametrize(
    ("architecture", "settings", "expected"),
    [
        ("MistralForCausalLM", {}, (4096,) * 6),
        ("MistralForCausalLM", {"sliding_window": None}, ()),
        ("LlamaForCausalLM", {"sliding_window": 64}, ()),
        ("Qwen2ForCausalLM", {"sliding_window": 64, "max_window_layers": 4}, ()),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 4},
         (0, 0, 0, 0, 64, 64)),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 6}, ()),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "sliding_window": 8,
                              "layer_types": ["sliding_attention"] + ["full_attention"] * 5}, (8, 0, 0, 0, 0, 0)),
    ],
)  # fmt: skip
def test_which_layers_have_a_window(
    tmp_path: Path, architecture: str, settings: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert read_hf_spec(write_config(tmp_path, architecture, **settings), None).windows == expected


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention is set"),
        ("Gemma3ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types should be a list of 6"),
        ("Gemma3ForCausalLM", {"layer_types": ["chunked_attention"] * 6}, "'chunked_attention' are not supported"),
        ("Gemma2ForCausalLM", {"sliding_window": None}, "sliding_window is not set"),
        ("MistralForCausalLM", {"sliding_window": -1}, "sliding_window is -1"),
        ("MixtralForCausalLM", {"num_experts_per_tok": 9}, "9 of 8 experts"),
        ("OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 8.0}, "clip_qkv is set"),
        ("GraniteForCausalLM", {"logits_scaling": 0}, "logits_scaling should be positive"),
        ("Qwen2ForCausalLM", {"rope_scaling": {"rope_type": "mrope"}}, "RoPE type 'mrope' is not supported"),
        ("Phi3ForCausalLM", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
    ],
)
def test_what_is_not_implemented_is_one_clear_line(
    tmp_path: Path, architecture: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        read_hf_spec(write_config(tmp_path, architecture, **settings), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("qwen2", "model.layers.1.self_attn.k_proj.bias"),
        ("gemma3", "model.layers.0.self_attn.q_norm.weight"),
        ("olmo2", "model.layers.2.post_feedforward_layernorm.weight"),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight"),
        ("mixtral", "model.layers.2.block_sparse_moe.experts.5.w2.weight"),
        ("qwen3 moe", "model.layers.0.mlp.gate.weight"),
    ],
)
def test_missing_and_misshapen_tensors_are_named(tmp_path: Path, case: str, name: str) -> None:
    directory = save_family(case, tmp_path).directory
    tensors = load_file(directory / "model.safetensors")
    kept = tensors.pop(name)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ModelError, match=f"lacks tensor {name};"):
        check_weights(open_safetensors(directory))
    save_file({**tensors, name: torch.zeros(kept.shape[0] + 1, *kept.shape[1:])}, directory / "model.safetensors")
    with pytest.raises(ModelError, match=rf"tensor {name} (has shape|is) \["):
        check_weights(open_safetensors(directory))
