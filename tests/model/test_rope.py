"""The rotation table against transformers' own."""

from __future__ import annotations

import pytest
import torch
from octavo.model import rope as rope_module
from octavo.model.rope import inverse_frequencies, rope_table
from octavo.model.spec import ModelError, RopeSpec
from octavo.model.weights.hf_spec import read_hf_spec
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    ("parameters", "spec"),
    [
        ({"rope_type": "default", "rope_theta": 1e5}, RopeSpec(theta=1e5, rotary_dim=16)),
        (
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
            RopeSpec(theta=1e4, rotary_dim=16, kind="linear", factor=2.5),
        ),
        (
            LLAMA3,
            RopeSpec(theta=5e5, rotary_dim=16, kind="llama3", factor=32.0, original_max_position_embeddings=128),
        ),
    ],
)
def test_tables_equal_transformers(llama_config, parameters, spec):
    config = llama_config(rope_parameters=parameters)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(400)[None])
    table = rope_table(spec, 400, torch.device("cpu"))
    assert table.dtype is torch.float32
    torch.testing.assert_close(table, torch.cat((cos[0, :, :8], sin[0, :, :8]), dim=-1), rtol=0, atol=1e-6)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 128,
    "factor": 4.0,
}
NTK = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize("length", [100, 700])
@pytest.mark.parametrize(
    "parameters",
    [
        YARN,
        YARN | {"beta_fast": 20.0, "beta_slow": 3.0, "attention_factor": 0.7},
        YARN | {"mscale": 0.707, "mscale_all_dim": 1.0},
        YARN | {"truncate": False},
        YARN | {"partial_rotary_factor": 0.5},
        LONGROPE,
        LONGROPE | {"factor": None},
        LONGROPE | {"attention_factor": 1.3},
        NTK,
        NTK | {"partial_rotary_factor": 0.5},
        LLAMA3 | {"partial_rotary_factor": 0.5},
    ],
)
def test_what_a_config_says_gives_transformers_tables(llama_config, tmp_path, parameters, length):
    """`length` is that of the longest sequence: what transformers takes for a sequence of this length."""
    config = llama_config(rope_parameters={key: value for key, value in parameters.items() if value is not None})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    spec = read_hf_spec(tmp_path, None).rope
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
    half = cos.shape[-1] // 2
    table = rope_table(spec, length, torch.device("cpu"))
    torch.testing.assert_close(table, torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1), rtol=0, atol=2e-6)


def test_yarn_extends_the_positions_that_the_model_knows(llama_config, tmp_path):
    config = llama_config(rope_parameters=YARN, max_position_embeddings=128)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    assert read_hf_spec(tmp_path, None).max_position_embeddings == 512


def test_explicit_factors_divide_the_frequencies():
    plain = inverse_frequencies(RopeSpec(rotary_dim=8))
    factors = (1.0, 2.0, 4.0, 32.0)
    scaled = inverse_frequencies(RopeSpec(rotary_dim=8, kind="factors", factors=factors))
    torch.testing.assert_close(scaled * torch.tensor(factors), plain)


def test_wrong_number_of_factors_is_an_error():
    with pytest.raises(ModelError, match="rope factors have 3 entries"):
        inverse_frequencies(RopeSpec(rotary_dim=8, kind="factors", factors=(1.0, 2.0, 3.0)))


def test_a_table_made_in_parts_is_the_same(monkeypatch):
    spec = RopeSpec(rotary_dim=8)
    whole = rope_table(spec, 100, torch.device("cpu"))
    monkeypatch.setattr(rope_module, "_TABLE_ROWS", 33)
    assert torch.equal(rope_table(spec, 100, torch.device("cpu")), whole)
