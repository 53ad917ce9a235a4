"""What cannot be dequantised is refused in one line that says what is wrong and how to mend it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo.model.header import read_header
from octavo.model.loader import check_weights
from octavo.model.spec import ModelError
from octavo.model.weights.dummy import open_dummy
from octavo.model.weights.safetensors_source import open_safetensors
from quantized_packers import Pack, awq, compressed, compressed_config, float8, gptq, write_llama
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
MODULE = "model.layers.0.self_attn.q_proj"


def with_weights(**changes: Any) -> dict[str, Any]:
    return compressed_config(INT4 | changes, "pack-quantized")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes', which is not supported; use the"),
        ({"load_in_8bit": True}, "'bitsandbytes', which"),
        *[
            ({"quant_method": method}, f"'{method}', which is not supported; use the unquantised model")
            for method in ("hqq", "quanto", "aqlm", "mxfp4", "torchao", "auto-round", "modelopt")
        ],
        ({"quant_method": "awq", "bits": 4, "version": "GEMV"}, r"AWQ in the packing 'gemv', .* \(gemm is\)"),
        ({"quant_method": "awq", "bits": 4, "backend": "llm-awq"}, "AWQ in the packing 'llm-awq'"),
        ({"quant_method": "awq", "bits": 8}, r"AWQ in '8' bits, .* \(4 are\)"),
        ({"quant_method": "gptq", "bits": 5}, r"GPTQ in '5' bits, .* \(2, 3, 4 and 8 are\)"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "GPTQ in the packing 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "GPTQ in the packing 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}, "GPTQ packed in 'int16'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size '0'"),
        ({"quant_method": "fp8", "scale_fmt": "log"}, "scales of the kind 'log'"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "experts in 'fp4'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "a block size of"),
        ({"quant_method": "fp8", "weight_block_size": [128, -1]}, "a block size of '-1'"),
        (compressed_config(INT4, "nvfp4-pack-quantized"), "the format 'nvfp4-pack-quantized'"),
        (compressed_config(INT4, "marlin-24"), "the format 'marlin-24'"),
        (with_weights(num_bits=3), "in 'int3', which"),
        (with_weights(num_bits=4, type="float"), "in 'float4', which"),
        (with_weights(strategy="tensor_group"), "the strategy 'tensor_group'"),
        (with_weights() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse as 'sparse-24-bitmask'"),
        (with_weights() | {"transform_config": {"config_groups": {"u": {}}}}, "rotated"),
        (with_weights() | {"quantization_status": "frozen"}, "saved while 'frozen'.* save_compressed=True"),
        (with_weights() | {"config_groups": [1]}, "an object of objects"),
    ],
)
def test_unknown_methods_and_variants(tmp_path: Path, config: Any, message: str) -> None:
    write_llama(tmp_path, awq, config)
    with pytest.raises(ModelError, match=message) as caught:
        open_safetensors(tmp_path)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)
    # A plan knows the sizes nevertheless, and says that the server would not take it.
    header = read_header(str(tmp_path))
    assert header.refusal is not None
    assert str(caught.value) in header.refusal


@pytest.mark.parametrize(("config", "message"), [({"bits": 4}, "no quant_method"), ("awq", "should be an object")])
def test_a_config_that_says_too_little(tmp_path: Path, config: Any, message: str) -> None:
    write_llama(tmp_path, awq, config)
    with pytest.raises(ModelError, match=message):
        open_safetensors(tmp_path)


def test_the_older_key_is_refused_alike(tmp_path: Path) -> None:
    write_llama(tmp_path, awq, None)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"compression_config": {"quant_method": "hqq"}}))
    with pytest.raises(ModelError, match="'hqq', which"):
        open_safetensors(tmp_path)
    with pytest.raises(ModelError, match="'hqq', which"):
        open_dummy(tmp_path)


def cut(name: str, size: int) -> Callable[[Tensors], None]:
    """Keep the first `size` rows."""

    def change(tensors: Tensors) -> None:
        tensors[f"{MODULE}.{name}"] = tensors[f"{MODULE}.{name}"][:size].clone()

    return change


def without(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[f"{MODULE}.{name}"]

    return change


def put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{MODULE}.{name}": tensor})


AWQ, GPTQ, FP8 = {"quant_method": "awq"}, {"quant_method": "gptq"}, {"quant_method": "fp8"}
INT4_PACK = compressed(4, "group", symmetric=True, packed=True)


@pytest.mark.parametrize(
    ("pack", "config", "change", "message"),
    [
        (awq, AWQ, without("scales"), "lacks its scales"),
        (awq, AWQ, without("qzeros"), "lacks its zeros"),
        (awq, AWQ, without("qweight"), "asks for|lacks tensor"),
        (awq, AWQ, cut("qzeros", 1), r"zeros of the shape \[1, 8\] where \[2, 8\]"),
        (awq, AWQ, cut("qweight", 63), r"2 scales for 63 rows or columns"),
        (awq, AWQ, cut("qweight", 32), r"is \[64, 32\] where the model's shape asks for \[64, 64\]"),
        (awq, AWQ, put("qweight", torch.zeros(64, 8)), "codes of the type F32"),
        (gptq(4), GPTQ, cut("g_idx", 50), "8 words of codes for 50 inputs"),
        (gptq(4), GPTQ, without("g_idx"), "states no bits"),
        (gptq(4), GPTQ | {"bits": 4}, cut("scales", 1), r"zeros of the shape \[2, 8\]"),
        (gptq(4), GPTQ, put("weight", torch.zeros(64, 64)), "is stored twice"),
        (float8("channel"), FP8, without("weight_scale"), "lacks its scales"),
        (float8("channel"), FP8, cut("weight_scale", 63), "63 scales for 64 rows"),
        (float8("channel"), FP8, put("weight", torch.zeros(64, 64, dtype=torch.int8)), "codes of the type I8"),
        (INT4_PACK, with_weights(), put("weight_shape", torch.tensor([64, 99])), r"a weight of \[64, 99\]"),
        (INT4_PACK, with_weights(), put("weight_shape", torch.tensor([-64, -64])), "a weight of"),
        (INT4_PACK, with_weights(), without("weight_shape"), "lacks its shape"),
        (INT4_PACK, with_weights(), put("weight_zero_point", torch.zeros(64, 1, dtype=torch.int8)), "zeros of the"),
        (INT4_PACK, with_weights(), put("weight_scale_2", torch.zeros(1)), "weight_scale_2"),
        (awq, None, lambda tensors: None, "has no quantization_config"),
    ],
)
def test_tensors_that_do_not_fit_together(
    tmp_path: Path, pack: Pack, config: Any, change: Callable[[Tensors], None], message: str
) -> None:
    write_llama(tmp_path, pack, config)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message) as caught:
        check_weights(open_safetensors(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [-1, 2])
def test_a_g_idx_outside_the_groups(tmp_path: Path, value: int) -> None:
    write_llama(tmp_path, gptq(4), GPTQ)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{MODULE}.g_idx"][5] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="g_idx names a group outside the 2"):
        open_safetensors(tmp_path).weight(f"{MODULE}.weight").dequantize(torch.float32)
