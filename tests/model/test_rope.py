"""The rotation table against transformers' own."""

from __future__ import annotations

import pytest
import torch
from octavo.model import rope as rope_module
from octavo.model.rope import inverse_frequencies, rope_table
from octavo.model.spec import ModelError, RopeSpec
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
