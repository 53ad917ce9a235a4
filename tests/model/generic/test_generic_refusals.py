"""What the generic path cannot serve is one line that says why."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_models import COMMON, save_family
from generic_models import save_generic
from octavo.model.loader import check_weights
from octavo.model.spec import ModelError
from octavo.model.weights.model_spec import read_model_spec
from octavo.model.weights.open import open_weights
from safetensors.torch import load_file, save_file


def write_config(directory: Path, architecture: str, **settings: Any) -> Path:
    """As transformers writes it."""
    model_class = getattr(transformers, architecture)
    config = model_class.config_class(**{**COMMON, **settings})
    config.architectures = [architecture]
    config.save_pretrained(directory)
    return directory


def refusal(directory: Path, impl: Any = "auto") -> str:
    with pytest.raises(ModelError) as caught:
        read_model_spec(directory, None, impl)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        ("GptOssForCausalLM", {"head_dim": 16, "num_local_experts": 4}, "its attention has sinks"),
        ("MambaForCausalLM", {}, "its layers keep a recurrent state instead of keys and values"),
        ("FalconH1ForCausalLM", {}, "its layers keep a recurrent state instead of keys and values"),
        ("BartForCausalLM", {}, "it is an encoder-decoder; only decoders are served"),
        ("StableLmForCausalLM", {}, "transformers computes its attention in code of its own"),
        ("BertLMHeadModel", {}, "its attention mask is neither causal nor a sliding window"),
        ("Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention", "conv"]}, "it has layers of the kind 'conv'"),
        ("BertForSequenceClassification", {}, "it is no causal language model of text alone"),
        ("Gemma3ForConditionalGeneration", {"vision_config": {}}, "it is no causal language model of text alone"),
        ("DeepseekV32ForCausalLM", {"num_key_value_heads": 4}, "it has layers of the kind 'indexed_attention'"),
    ],
)
def test_an_architecture_out_of_reach(tmp_path: Path, architecture: str, settings: dict[str, Any], reason: str) -> None:
    message = refusal(write_config(tmp_path, architecture, **settings))
    assert message.startswith(f"the model's architecture {architecture} is not supported: it has no native family, and")
    assert reason in message
    assert message.endswith("; choose another model")


def test_an_architecture_that_nobody_knows(tmp_path: Path) -> None:
    config = {**COMMON, "architectures": ["NobodysForCausalLM"], "model_type": "nobodys"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "and transformers 5." in refusal(tmp_path)
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_nobody.NobodysForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_nobody.py").write_text("raise SystemExit('this ran')")
    assert "does not know it either, and code that lies beside the weights is never run" in refusal(tmp_path)


def test_a_kind_that_is_no_string(tmp_path: Path) -> None:
    config = {**COMMON, "architectures": ["GPTNeoXForCausalLM"], "model_type": ["gpt_neox"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "does not know it either" in refusal(tmp_path)


def test_no_family_is_wanted_where_there_is_none(tmp_path: Path) -> None:
    write_config(tmp_path, "GPTNeoXForCausalLM", hidden_act="silu")
    assert "GPTNeoXForCausalLM is not supported; known: Gemma2" in refusal(tmp_path, "native")


def test_rotations_that_depend_on_a_step_are_refused_for_a_native_family_too(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    write_config(tmp_path, "Phi3ForCausalLM", rope_parameters=rope, original_max_position_embeddings=64)
    message = refusal(tmp_path, "generic")
    assert message.startswith("the generic path cannot serve this Phi3ForCausalLM: its rotary positions are of the ")
    assert message.endswith("; leave model-impl out")


def test_settings_that_transformers_does_not_accept(tmp_path: Path) -> None:
    write_config(tmp_path, "GPTNeoXForCausalLM")
    values = json.loads((tmp_path / "config.json").read_text())
    for change, expected in (
        ({"hidden_act": "nonsense"}, "transformers cannot build a GPTNeoXForCausalLM of this config"),
        ({"max_position_embeddings": 0}, "its config says that max_position_embeddings is 0"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "'bitsandbytes', which is not supported"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
        assert expected in refusal(tmp_path)


Change = Callable[[dict[str, torch.Tensor]], None]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.pop("gpt_neox.layers.1.mlp.dense_h_to_4h.bias"), "lacks tensor gpt_neox.layers.1.mlp"),
        (lambda state: state.update(extra=torch.zeros(2)), "holds tensor extra, which is not part of a GPTNeoXForCaus"),
        (
            lambda state: state.update({"gpt_neox.final_layer_norm.weight": torch.zeros(3)}),
            "tensor gpt_neox.final_layer_norm.weight has shape [3], but the config asks for [64]",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_found_by_its_headers(tmp_path: Path, change: Change, expected: str) -> None:
    save_generic("gpt neox", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as caught:
        check_weights(open_weights(str(tmp_path)))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["gpt2", "deepseek v3", "qwen2 moe"])
def test_a_checkpoint_is_counted_without_being_read(tmp_path: Path, case: str) -> None:
    family = save_generic(case, tmp_path)
    assert check_weights(open_weights(str(tmp_path))) == sum(p.numel() for p in family.oracle.parameters())


def test_names_of_older_checkpoints_are_understood(tmp_path: Path) -> None:
    """GPT-2's own files lack the prefix of the decoder, and keep masks as buffers."""
    family = save_generic("gpt2", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): value for name, value in state.items()}
    old["h.0.attn.bias"] = torch.ones((1, 1, 256, 256))
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    assert check_weights(open_weights(str(tmp_path))) == sum(p.numel() for p in family.oracle.parameters())


def test_a_native_family_starts_without_transformers(tmp_path: Path) -> None:
    save_family("mistral", tmp_path)
    code = (
        "import sys\n"
        "from octavo.model.loader import check_weights\nfrom octavo.model.weights.open import open_weights\n"
        f"check_weights(open_weights({str(tmp_path)!r})); print('transformers' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
