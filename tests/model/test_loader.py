"""A checkpoint is checked before it is read, and every complaint fits one line."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from octavo.model.config import ModelConfig
from octavo.model.loader import check_weights
from octavo.model.registry import model_family
from octavo.model.runner import ModelRunner
from octavo.model.spec import ModelError


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}])
def test_declared_parameters_are_those_of_transformers(make_source, changes):
    source = make_source(**changes)
    declared = dict(model_family("LlamaForCausalLM").parameters(source.spec))
    present = {name: tuple(tensor.shape) for name, tensor in source.state.items()}
    if source.spec.tie_word_embeddings:
        present.pop("lm_head.weight", None)
    assert declared == present
    count = check_weights(source)
    assert count == sum(torch.Size(shape).numel() for shape in present.values())


def message_of(source) -> str:
    with pytest.raises(ModelError) as caught:
        check_weights(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_tensors_are_named(make_source):
    source = make_source()
    del source.state["model.layers.1.mlp.up_proj.weight"]
    assert "lacks tensor model.layers.1.mlp.up_proj.weight;" in message_of(source)
    del source.state["model.layers.0.input_layernorm.weight"]
    assert "lacks tensor model.layers.0.input_layernorm.weight and 1 more;" in message_of(source)


def test_wrong_shapes_are_named(make_source):
    source = make_source()
    source.state["model.norm.weight"] = torch.zeros(7)
    assert "tensor model.norm.weight has shape [7], but the config asks for [96]" in message_of(source)


def test_unknown_architectures_list_the_known(make_source):
    source = make_source()
    source.spec = dataclasses.replace(source.spec, architecture="GPT9ForCausalLM")
    assert "GPT9ForCausalLM is not supported; known: LlamaForCausalLM" in message_of(source)


def test_tensors_that_nobody_reads_are_no_error(make_source):
    source = make_source()
    source.state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    check_weights(source)


def test_loading_reports_progress_and_times(make_source):
    seen: list[tuple[str, float]] = []
    runner = ModelRunner(
        ModelConfig(path="", device="cpu", dtype="float32"),
        block_size=16,
        progress=lambda phase, share: seen.append((phase, share)),
        source=make_source(),
    )
    shares = [share for phase, share in seen if phase == "load"]
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    assert set(runner.phases) == {"open", "load"}
    assert runner.weight_bytes == sum(t.nbytes for n, t in make_source().state.items() if n != "lm_head.weight")


def test_unknown_kernel_backend_is_a_model_error(make_source):
    config = ModelConfig(path="", device="cpu", dtype="float32", kernel_backend="nonesuch")
    with pytest.raises(ModelError, match="unknown kernel backend 'nonesuch'"):
        ModelRunner(config, block_size=16, source=make_source())


def test_a_batch_before_the_pool_is_a_programming_error(make_source):
    runner = ModelRunner(ModelConfig(path="", device="cpu", dtype="float32"), block_size=16, source=make_source())
    with pytest.raises(RuntimeError, match="allocate_cache"):
        _ = runner.kv_pool
