"""Quantised safetensors: every format's weights come back as they were packed, under their plain names and shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from octavo.model.config import ModelConfig
from octavo.model.header import read_header
from octavo.model.loader import check_weights
from octavo.model.runner import ModelRunner
from octavo.model.spec import ModelError
from octavo.model.weights.safetensors_source import SafetensorsSource, open_safetensors
from octavo.scheduler.batch import ScheduledBatch, ScheduledRow
from octavo.scheduler.sampling_params import SamplingParams
from quantized_packers import (
    GROUP,
    Checkpoint,
    Pack,
    awq,
    compressed,
    compressed_config,
    float8,
    gptq,
    llama_config,
    write_llama,
)
from safetensors.torch import load_file, save_file

AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def gptq_config(bits: int, **changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False, "sym": False} | changes


def ints(bits: int, strategy: str, format_: str, symmetric: bool) -> dict[str, Any]:
    group_size = GROUP if strategy == "group" else None
    weights = {
        "num_bits": bits, "type": "int", "strategy": strategy, "group_size": group_size, "symmetric": symmetric,
    }  # fmt: skip
    return compressed_config(weights, format_)


def floats(strategy: str, **changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True} | changes
    return compressed_config(weights, "float-quantized")


FORMATS: dict[str, tuple[Pack, dict[str, Any], str]] = {
    "awq": (awq, AWQ, "AWQ-INT4 g32"),
    "gptq2": (gptq(2), gptq_config(2), "GPTQ-INT2 g32"),
    "gptq3": (gptq(3), gptq_config(3), "GPTQ-INT3 g32"),
    "gptq4": (gptq(4), gptq_config(4), "GPTQ-INT4 g32"),
    "gptq8": (gptq(8), gptq_config(8), "GPTQ-INT8 g32"),
    "gptq4_desc_act": (gptq(4, act_order=True), gptq_config(4, desc_act=True), "GPTQ-INT4 g32"),
    "gptq3_v2": (gptq(3, version=2), gptq_config(3, checkpoint_format="gptq_v2"), "GPTQ-INT3 g32"),
    "gptq4_v2": (gptq(4, version=2), gptq_config(4, checkpoint_format="gptq_v2"), "GPTQ-INT4 g32"),
    "gptq4_one_group": (gptq(4, whole=True), gptq_config(4, group_size=-1), "GPTQ-INT4 per channel"),
    "gptq4_no_g_idx": (gptq(4, g_idx=False), gptq_config(4), "GPTQ-INT4 g32"),
    "fp8_tensor": (float8("tensor"), FP8, "FP8-E4M3 per tensor"),
    "fp8_scalar": (float8("scalar"), FP8 | {"activation_scheme": "static"}, "FP8-E4M3 per tensor"),
    "fp8_channel": (float8("channel"), FP8, "FP8-E4M3 per channel"),
    "fp8_vector": (float8("vector"), {"quant_method": "fbgemm_fp8"}, "FP8-E4M3 per channel"),
    "fp8_block": (float8((32, 32), "weight_scale_inv"), FP8 | {"weight_block_size": [32, 32]}, "FP8-E4M3 32x32"),
    # 40 and 48 divide neither 64 nor 96: the last block of a row or column is smaller.
    "fp8_ragged": (float8((48, 40), "weight_scale_inv"), FP8 | {"weight_block_size": [48, 40]}, "FP8-E4M3 48x40"),
    "fp8_e5m2": (float8("tensor", dtype=torch.float8_e5m2), FP8, "FP8-E5M2 per tensor"),
    "ct_fp8_tensor": (float8("tensor"), floats("tensor"), "FP8-E4M3 per tensor"),
    "ct_fp8_channel": (float8("channel"), floats("channel"), "FP8-E4M3 per channel"),
    "ct_fp8_block": (float8((48, 40)), floats("block", block_structure=[48, 40]), "FP8-E4M3 48x40"),
    "ct_int8_channel": (
        compressed(8, "channel", symmetric=True, packed=False),
        ints(8, "channel", "int-quantized", True),
        "INT8 per channel",
    ),
    "ct_int8_tensor_asymmetric": (
        compressed(8, "tensor", symmetric=False, packed=False),
        ints(8, "tensor", "int-quantized", False),
        "INT8 per tensor",
    ),
    "ct_int4_group": (
        compressed(4, "group", symmetric=True, packed=True),
        ints(4, "group", "pack-quantized", True),
        "INT4 g32",
    ),
    "ct_int4_group_asymmetric": (
        compressed(4, "group", symmetric=False, packed=True),
        ints(4, "group", "pack-quantized", False),
        "INT4 g32",
    ),
    "ct_int4_group_order": (
        compressed(4, "group", symmetric=True, packed=True, g_idx=True),
        ints(4, "group", "pack-quantized", True),
        "INT4 g32",
    ),
    "ct_int4_channel_asymmetric": (
        compressed(4, "channel", symmetric=False, packed=True),
        ints(4, "channel", "pack-quantized", False),
        "INT4 per channel",
    ),
    "ct_int8_group_asymmetric": (
        compressed(8, "group", symmetric=False, packed=True),
        ints(8, "group", "pack-quantized", False),
        "INT8 g32",
    ),
}


@pytest.fixture(params=FORMATS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Checkpoint, str]:
    pack, config, encoding = FORMATS[request.param]
    return write_llama(tmp_path, pack, config), encoding


def test_weights_come_back_as_they_were_packed(case: tuple[Checkpoint, str]) -> None:
    checkpoint, encoding = case
    source = open_safetensors(checkpoint.path)
    assert set(source.names()) == set(checkpoint.state)
    assert check_weights(source) == checkpoint.num_parameters
    for name, expected in checkpoint.state.items():
        weight = source.weight(name)
        assert weight.name == name
        assert weight.shape == tuple(expected.shape)
        assert weight.encoding == (encoding if "_proj" in name else "F32")
        values = weight.dequantize(torch.float32)
        assert values.is_contiguous()
        assert torch.equal(values, expected), name
        # Computed in fp32, and rounded once.
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(weight.dequantize(dtype), expected.to(dtype)), name


def test_the_model_computes_what_its_dequantised_weights_do(
    case: tuple[Checkpoint, str], proves: Callable[..., None]
) -> None:
    from transformers import LlamaForCausalLM

    checkpoint, encoding = case
    oracle = LlamaForCausalLM(llama_config()).eval()
    oracle.load_state_dict(checkpoint.state)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8]]
    with torch.inference_mode():
        expected = torch.stack([oracle(torch.tensor([prompt])).logits[0, -1] for prompt in prompts])
    runner = ModelRunner(ModelConfig(path=str(checkpoint.path), dtype="float32", device="cpu"), block_size=16)
    runner.allocate_cache(kv_cache_memory=2**20, max_num_seqs=4, max_model_len=64, max_num_batched_tokens=64)
    greedy = SamplingParams(temperature=0.0)
    rows = [
        ScheduledRow(str(index), prompt, len(prompt), 0, len(prompt), ([2 * index + 1, 2 * index + 2],), greedy, 0)
        for index, prompt in enumerate(prompts)
    ]
    logits = runner.forward_logits(ScheduledBatch(rows, 0))
    torch.testing.assert_close(logits.float(), expected, rtol=1e-3, atol=1e-3)
    assert sum(math.prod(shape) for _, shape in runner.weights) == checkpoint.num_parameters
    assert runner.weight_bytes == runner.backend.weight_bytes([("F32", shape) for _, shape in runner.weights])
    proves(
        architecture="LlamaForCausalLM", path="native", weights=f"safetensors {encoding.split()[0]}",
        backend=runner.backend.name,
    )  # fmt: skip


def test_a_plan_counts_the_dequantised_weights(case: tuple[Checkpoint, str]) -> None:
    checkpoint, _ = case
    header = read_header(str(checkpoint.path))
    assert header.refusal is None
    assert header.num_parameters == checkpoint.num_parameters
    (checkpoint.path / "model.safetensors").rename(checkpoint.path / "elsewhere")
    assert read_header(str(checkpoint.path)).num_parameters == checkpoint.num_parameters


def awq_checkpoint(path: Path, **config: Any) -> Checkpoint:
    return write_llama(path, awq, AWQ | config)


def test_the_start_says_that_weights_are_dequantised(tmp_path: Path) -> None:
    awq_checkpoint(tmp_path)
    runner = ModelRunner(ModelConfig(path=str(tmp_path), dtype="bfloat16", device="cpu"), block_size=16)
    matrices = [math.prod(shape) for encoding, shape in runner.weights if encoding.startswith("AWQ")]
    num_kib = round(2 * sum(matrices) / 1024)
    assert f"weights are AWQ-INT4 g32, served dequantised to bfloat16 ({num_kib} KiB)" in runner.notes


def test_weights_outlive_their_source(tmp_path: Path) -> None:
    checkpoint = awq_checkpoint(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    source = open_safetensors(tmp_path)
    weight = source.weight(name)
    source.close()
    assert torch.equal(weight.dequantize(torch.float32), checkpoint.state[name])
    with pytest.raises(ModelError, match="closed"):
        source.weight(name)
    with pytest.raises(NotImplementedError, match="dequantize it"):
        weight.raw()


def test_matrices_larger_than_a_tile(tmp_path: Path) -> None:
    """Tiles end at the edges of a matrix, wherever those are."""
    for pack, config in ((awq, AWQ), (gptq(3, act_order=True), gptq_config(3)), (float8("channel"), FP8)):
        changes = {"hidden_size": 32, "intermediate_size": 1056, "num_hidden_layers": 1}
        checkpoint = write_llama(tmp_path, pack, config, **changes)
        source = open_safetensors(tmp_path)
        for name in source.names():
            assert torch.equal(source.weight(name).dequantize(torch.float32), checkpoint.state[name]), name


def test_every_float8_code_is_what_its_bits_say(tmp_path: Path) -> None:
    def meaning(code: int) -> float:
        sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, (code >> 3) & 15, code & 7
        if exponent == 15 and mantissa == 7:
            return math.nan
        return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))

    def pack(random: np.random.Generator, outputs: int, inputs: int) -> Any:
        codes = torch.arange(outputs * inputs, dtype=torch.int64).remainder(256).to(torch.uint8).view(outputs, inputs)
        packed = float8("scalar")(random, outputs, inputs)
        packed.tensors |= {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": torch.tensor(0.5)}
        return packed

    write_llama(tmp_path, pack, FP8)
    values = open_safetensors(tmp_path).weight("model.layers.0.self_attn.q_proj.weight").dequantize(torch.float32)
    expected = torch.tensor([meaning(code) / 2 for code in range(256)])
    torch.testing.assert_close(values.flatten()[:256], expected, rtol=0, atol=0, equal_nan=True)


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    def pack(random: np.random.Generator, outputs: int, inputs: int) -> Any:
        packed = float8((32, 32), "weight_scale_inv")(random, outputs, inputs)
        exponents = torch.from_numpy(random.integers(110, 127, (-(-outputs // 32), inputs // 32)).astype(np.uint8))
        scales = torch.exp2(exponents.float() - 127).repeat_interleave(32, 0).repeat_interleave(32, 1)
        packed.tensors["weight_scale_inv"] = exponents.view(torch.float8_e8m0fnu)
        packed.value = packed.tensors["weight"].float() * scales[:outputs]
        return packed

    checkpoint = write_llama(tmp_path, pack, FP8 | {"weight_block_size": [32, 32], "scale_fmt": "ue8m0"})
    source = open_safetensors(tmp_path)
    for name in source.names():
        assert torch.equal(source.weight(name).dequantize(torch.float32), checkpoint.state[name]), name


def rewritten(path: Path, change: Any) -> SafetensorsSource:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({name: value.clone() for name, value in tensors.items()}, path / "model.safetensors")
    return open_safetensors(path)


def test_a_quantised_head_and_one_module_left_alone(tmp_path: Path) -> None:
    checkpoint = write_llama(tmp_path, gptq(4), gptq_config(4, lm_head=True))
    head = gptq(4)(np.random.default_rng(1), 40, 64)
    plain = "model.layers.0.self_attn.q_proj"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["lm_head.weight"]
        tensors |= {f"lm_head.{leaf}": part for leaf, part in head.tensors.items()}
        for leaf in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{plain}.{leaf}"]
        tensors[f"{plain}.weight"] = torch.full((64, 64), 0.25, dtype=torch.float16)

    source = rewritten(tmp_path, change)
    assert set(source.names()) == set(checkpoint.state)
    assert torch.equal(source.weight("lm_head.weight").dequantize(torch.float32), head.value)
    assert source.weight(f"{plain}.weight").encoding == "F16"
    assert check_weights(source) == checkpoint.num_parameters


def test_modules_of_other_bits_than_the_rest(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`: g_idx tells how many inputs there are, so the codes tell their bits."""
    checkpoint = write_llama(tmp_path, gptq(4), gptq_config(4, dynamic={r"+:.*down_proj": {"bits": 8}}))
    name = "model.layers.0.mlp.down_proj"
    other = gptq(8)(np.random.default_rng(1), 64, 96)
    source = rewritten(tmp_path, lambda tensors: tensors.update({f"{name}.{k}": v for k, v in other.tensors.items()}))
    assert check_weights(source) == checkpoint.num_parameters
    assert source.weight(f"{name}.weight").encoding == "GPTQ-INT8 g32"
    assert torch.equal(source.weight(f"{name}.weight").dequantize(torch.float32), other.value)


def test_biases_of_zeros_change_nothing(tmp_path: Path) -> None:
    """AutoGPTQ writes them for every matrix; a head has none in a Llama."""
    checkpoint = write_llama(tmp_path, gptq(4), gptq_config(4, lm_head=True))
    head = gptq(4)(np.random.default_rng(1), 40, 64).tensors

    def change(tensors: dict[str, torch.Tensor], bias: float) -> None:
        tensors.pop("lm_head.weight", None)
        tensors |= {f"lm_head.{leaf}": part for leaf, part in head.items()} | {"lm_head.bias": torch.full((40,), bias)}

    source = rewritten(tmp_path, lambda tensors: change(tensors, 0.0))
    assert check_weights(source) == checkpoint.num_parameters
    source = rewritten(tmp_path, lambda tensors: change(tensors, 1.0))
    with pytest.raises(ModelError, match=r"lm_head\.bias"):
        check_weights(source)


def test_scales_of_activations_and_of_the_cache_go_unread(tmp_path: Path) -> None:
    checkpoint = write_llama(tmp_path, float8("tensor"), floats("tensor"))
    extra = {
        f"model.layers.0.self_attn.{name}": torch.ones(1) for name in ("k_scale", "v_scale", "k_proj.output_scale")
    }
    assert set(rewritten(tmp_path, lambda tensors: tensors.update(extra)).names()) == set(checkpoint.state)
