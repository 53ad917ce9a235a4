"""A checkpoint is checked before it is read, and every complaint fits one line."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from octavo.kernels.select import select_backend
from octavo.model import runner as runner_module
from octavo.model.config import ModelConfig
from octavo.model.families import decoder as decoder_module
from octavo.model.loader import check_weights, dequantized_note
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
    assert "GPT9ForCausalLM is not supported; known: Gemma2ForCausalLM, " in message_of(source)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_norm.weight", "model.layers.2.mlp.up_proj.weight", "visual.x", "lm_head.bias"]
)
def test_tensors_that_mean_another_model_are_refused(make_source, name):
    source = make_source()
    source.state[name] = torch.zeros(16)
    assert f"holds tensor '{name}', which is not part of a LlamaForCausalLM" in message_of(source)
    source.state["zzz"] = torch.zeros(1)
    assert f"'{name}' and 1 more" in message_of(source)


def test_biases_on_the_inputs_of_attention_alone(make_source):
    source = make_source(attention_bias=True)
    for layer in range(2):
        del source.state[f"model.layers.{layer}.self_attn.o_proj.bias"]
    assert "lacks tensor model.layers.0.self_attn.o_proj.bias and 1 more" in message_of(source)
    source.spec = dataclasses.replace(source.spec, output_bias=False)
    check_weights(source)
    source.spec = dataclasses.replace(source.spec, attention_bias=False)
    assert "holds tensor 'model.layers.0.self_attn.k_proj.bias' and 5 more" in message_of(source)


def test_buffers_that_nobody_reads_are_no_error(make_source):
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
        _ = runner.kv_pools


def small_runner(make_source, **changes):
    return ModelRunner(
        ModelConfig(path="", device="cpu", dtype="float32"), block_size=16, source=make_source(**changes)
    )


def allocate(runner, **changes):
    settings = {"kv_cache_memory": 2**20, "max_num_seqs": 4, "max_model_len": None, "max_num_batched_tokens": 64}
    return runner.allocate_cache(**(settings | changes))


@pytest.mark.parametrize("place", ["load_model", "allocate_pools"])
def test_failed_allocations_are_one_line_that_says_what_to_change(make_source, monkeypatch, place):
    def fail(*args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory:\nyou tried to allocate 99 bytes")

    monkeypatch.setattr(runner_module, place, fail)
    with pytest.raises(ModelError, match=r"there is not enough memory for the .* smaller") as caught:
        allocate(small_runner(make_source))
    assert "\n" not in str(caught.value)


def test_other_errors_of_loading_stay_what_they_are(make_source, monkeypatch):
    def fail(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(runner_module, "load_model", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        small_runner(make_source)


def test_rotations_are_made_for_the_context_served_not_for_the_one_in_the_config(make_source, monkeypatch):
    made = []
    original = decoder_module.rope_table
    monkeypatch.setattr(
        decoder_module, "rope_table", lambda rope, count, device: made.append(count) or original(rope, count, device)
    )
    runner = small_runner(make_source, max_position_embeddings=2 * 10**9)
    assert made == []
    plan = allocate(runner)
    assert made == [plan.max_model_len]
    assert plan.max_model_len < 10**5


def test_what_a_backend_does_not_keep_quantised_is_named():
    weights = [
        ("IQ4_XS", (64, 256)),
        ("Q8_0", (512, 1024)),
        ("F32", (64,)),
        ("BF16", (64, 256)),
        ("IQ4_NL", (1, 64, 256)),
    ]
    reference = select_backend("reference", torch.device("cpu"), torch.bfloat16, 64)
    everything = "weights are IQ4_NL, IQ4_XS, Q8_0, served dequantised to bfloat16 (1 MiB)"
    assert dequantized_note(weights, reference, torch.bfloat16) == everything
    assert dequantized_note(weights, None, torch.bfloat16) == everything
    assert dequantized_note(weights[2:4], reference, torch.bfloat16) is None
    triton = select_backend("triton", torch.device("cpu"), torch.float16, 64)
    partly = "weights are partly IQ4_NL, IQ4_XS, served dequantised to float16 (64 KiB)"
    assert dequantized_note(weights, triton, torch.float16) == partly
    assert dequantized_note([("Q8_0", (1, 64, 256))], triton, torch.float16) is not None  # an expert's
