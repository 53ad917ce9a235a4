"""Bytes, FLOPs and floors of a step, against figures worked out by hand for Llama 3.1 8B."""

from __future__ import annotations

import math

import pytest
from octavo.model.families.llama import LlamaForCausalLM
from octavo.model.spec import ModelSpec, RopeSpec
from octavo.server.bench.roofline import ModelCost, StepShape, floor, model_cost, step_cost

H200_BYTES_PER_S = 4.3e12


def llama_3_8b(*, tied: bool = False) -> ModelCost:
    spec = ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope=RopeSpec(rotary_dim=128),
        max_position_embeddings=131072,
        tie_word_embeddings=tied,
    )
    parameters = [(name, shape, 2 * math.prod(shape)) for name, shape in LlamaForCausalLM.parameters(spec)]
    return model_cost(spec, parameters, itemsize=2)


def test_sizes_of_llama_3_8b() -> None:
    model = llama_3_8b()
    assert model.layer_matmul_parameters == 32 * (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336)
    assert model.head_parameters == 128256 * 4096
    assert model.vector_parameters == 65 * 4096
    assert model.weight_bytes == pytest.approx(15.0e9, rel=1e-3)  # of 16.06e9: the input embedding is not read
    assert model.kv_bytes_per_token == 128 * 1024


def test_a_tied_table_is_read_as_the_head() -> None:
    assert llama_3_8b(tied=True).weight_bytes == llama_3_8b().weight_bytes


@pytest.mark.parametrize(
    ("num_rows", "num_context", "tokens_per_s"), [(1, 1024, 283), (32, 1024, 7130), (32, 4096, 4270)]
)
def test_decode_rates_at_the_bandwidth_of_an_h200(num_rows: int, num_context: int, tokens_per_s: float) -> None:
    cost = step_cost(llama_3_8b(), StepShape(num_rows, num_context, 1))
    limit = floor(cost, H200_BYTES_PER_S, 800e12)
    assert limit.bound == "memory"
    assert num_rows / limit.seconds == pytest.approx(tokens_per_s, rel=5e-3)


def test_bytes_and_flops_of_a_decode() -> None:
    model = llama_3_8b()
    cost = step_cost(model, StepShape(num_rows=4, num_context=100, num_new=1))
    assert cost.kv_read_bytes == 4 * 100 * 131072
    assert cost.kv_written_bytes == 4 * 131072
    assert cost.embedding_bytes == 4 * 4096 * 2
    assert cost.num_bytes == model.weight_bytes + 4 * (101 * 131072 + 8192)
    products = 2 * (model.layer_matmul_parameters + model.head_parameters)
    attention = 4 * 32 * 128 * 32 * 101  # a query sees its context and itself
    assert cost.flops == 4 * (products + attention)


def test_a_prefill_chunk_sees_its_context_and_what_of_itself_came_before() -> None:
    shape = StepShape(num_rows=1, num_context=10, num_new=3)
    assert shape.num_pairs == 11 + 12 + 13
    model = llama_3_8b()
    cost = step_cost(model, shape)
    assert cost.flops == 2 * (3 * model.layer_matmul_parameters + model.head_parameters) + 36 * 4 * 32 * 128 * 32
    assert cost.kv_read_bytes == 10 * 131072  # once, for all three


def test_a_long_chunk_is_bound_by_compute() -> None:
    cost = step_cost(llama_3_8b(), StepShape(1, 0, 8192))
    limit = floor(cost, H200_BYTES_PER_S, 800e12)
    assert limit.bound == "compute"
    assert limit.seconds == cost.flops / 800e12


def test_kinds() -> None:
    assert (StepShape(2, 5, 1).kind, StepShape(1, 0, 2).kind) == ("decode", "prefill")
    assert StepShape(3, 5, 2).num_tokens == 6
