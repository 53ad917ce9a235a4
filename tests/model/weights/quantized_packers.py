"""Quantised checkpoints of a tiny Llama, packed as the formats' makers publish them.

Written against the formats and not against the code under test: bits are laid down one number at a time, with
Python's integers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from weight_files import HEADS, HIDDEN, INNER, KV_HEADS, LAYERS, VOCAB

GROUP = 32


def bit_stream(numbers: Iterable[int], bits: int) -> np.ndarray:
    """Numbers one after the other, the first in the lowest bits, as 32-bit words. int32 [n * bits / 32, rounded up]"""
    stream = num_bits = 0
    for number in numbers:
        assert 0 <= number < 1 << bits
        stream |= int(number) << num_bits
        num_bits += bits
    num_words = -(-num_bits // 32)
    return np.frombuffer(stream.to_bytes(4 * num_words, "little"), dtype="<i4")


def down_columns(numbers: np.ndarray, bits: int) -> torch.Tensor:
    """Every column a stream of its own. [n, m] → int32 [n * bits / 32, m]"""
    return torch.from_numpy(np.stack([bit_stream(column, bits) for column in numbers.T.tolist()], axis=1))


def along_rows(numbers: np.ndarray, bits: int) -> torch.Tensor:
    """Every row a stream of its own. [n, m] → int32 [n, m * bits / 32]"""
    return torch.from_numpy(np.stack([bit_stream(row, bits) for row in numbers.tolist()]))


def awq_words(numbers: np.ndarray) -> torch.Tensor:
    """AutoAWQ's order: of eight neighbours, the even ones and then the odd ones. [n, m] → int32 [n, m / 8]"""
    shuffled = numbers.reshape(numbers.shape[0], -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
    return along_rows(shuffled.reshape(numbers.shape), 4)


@dataclass
class Packed:
    """One matrix as a file holds it, by the ends of names, and what it stands for."""

    tensors: dict[str, torch.Tensor]
    value: torch.Tensor
    """fp32 [outputs, inputs]"""


Pack = Callable[[np.random.Generator, int, int], Packed]
"""(random, outputs, inputs) → a random matrix."""


def _scales(random: np.random.Generator, *shape: int) -> np.ndarray:
    return (random.random(shape) * 0.02 + 0.005).astype(np.float16)


def _value(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(((codes - zeros) * scales.astype(np.float32)).astype(np.float32))


def awq(random: np.random.Generator, outputs: int, inputs: int) -> Packed:
    codes = random.integers(0, 16, (inputs, outputs))
    zeros = random.integers(0, 16, (inputs // GROUP, outputs))
    scales = _scales(random, inputs // GROUP, outputs)
    value = _value(codes, zeros.repeat(GROUP, 0), scales.repeat(GROUP, 0)).T.contiguous()
    tensors = {"qweight": awq_words(codes), "qzeros": awq_words(zeros), "scales": torch.from_numpy(scales)}
    return Packed(tensors, value)


def gptq(bits: int, *, version: int = 1, act_order: bool = False, whole: bool = False, g_idx: bool = True) -> Pack:
    def pack(random: np.random.Generator, outputs: int, inputs: int) -> Packed:
        group = inputs if whole else GROUP
        groups = np.arange(inputs) // group
        if act_order:
            groups = random.permutation(groups)
        codes = random.integers(0, 1 << bits, (inputs, outputs))
        # What version 1 stores is one less, so that a zero point of 0 is not to be had without wrapping.
        zeros = random.integers(0, 1 << bits, (inputs // group, outputs))
        scales = _scales(random, inputs // group, outputs)
        stored = (zeros - (version == 1)) % (1 << bits)
        tensors = {
            "qweight": down_columns(codes, bits),
            "qzeros": along_rows(stored, bits),
            "scales": torch.from_numpy(scales),
        }
        if g_idx:
            tensors["g_idx"] = torch.from_numpy(groups.astype(np.int32))
        return Packed(tensors, _value(codes, zeros[groups], scales[groups]).T.contiguous())

    return pack


def float8(block: tuple[int, int] | str, name: str = "weight_scale", dtype: torch.dtype = torch.float8_e4m3fn) -> Pack:
    """`block`: (outputs, inputs) that share a scale, or "tensor", "scalar", "channel", "vector"."""

    def pack(random: np.random.Generator, outputs: int, inputs: int) -> Packed:
        codes = torch.from_numpy(random.standard_normal((outputs, inputs)).astype(np.float32) * 50).to(dtype)
        down, across = {"channel": (1, inputs), "vector": (1, inputs)}.get(str(block), (outputs, inputs))
        if not isinstance(block, str):
            down, across = block
        grid = (-(-outputs // down), -(-inputs // across))
        scales = torch.from_numpy(random.random(grid).astype(np.float32) * 0.001 + 0.0005)
        value = torch.empty(outputs, inputs)
        for row in range(outputs):
            for column in range(grid[1]):
                span = slice(column * across, (column + 1) * across)
                value[row, span] = codes[row, span].float() * scales[row // down, column]
        stored = {"tensor": (1,), "scalar": (), "vector": (outputs,)}.get(str(block), grid)
        return Packed({"weight": codes, name: scales.view(stored), "input_scale": torch.tensor(1.0)}, value)

    return pack


def compressed(bits: int, strategy: str, *, symmetric: bool, packed: bool, g_idx: bool = False) -> Pack:
    """compressed-tensors: signed codes; packed ones, and the zero points beside them, are shifted to be unsigned."""

    def pack(random: np.random.Generator, outputs: int, inputs: int) -> Packed:
        half = 1 << (bits - 1)
        width = {"group": GROUP, "channel": inputs, "tensor": inputs}[strategy]
        grid = (1 if strategy == "tensor" else outputs, inputs // width)
        groups = np.arange(inputs) // width
        if g_idx:
            groups = random.permutation(groups)
        codes = random.integers(-half, half, (outputs, inputs))
        zeros = np.zeros(grid, np.int64) if symmetric else random.integers(-half, half, grid)
        scales = _scales(random, *grid)
        value = _value(codes, zeros[:, groups], scales[:, groups])
        tensors = {"weight_scale": torch.from_numpy(scales)}
        if packed:
            tensors["weight_packed"] = along_rows(codes + half, bits)
            tensors["weight_shape"] = torch.tensor([outputs, inputs])
        else:
            tensors["weight"] = torch.from_numpy(codes.astype(np.int8))
        if not symmetric:
            is_packed = packed and strategy != "tensor"
            tensors["weight_zero_point"] = (
                down_columns(zeros + half, bits) if is_packed else torch.from_numpy(zeros.astype(np.int8))
            )
        if g_idx:
            tensors["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
        return Packed(tensors, value)

    return pack


def compressed_config(weights: dict[str, Any], format_: str, **changes: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors", "format": format_, "quantization_status": "compressed",
        "config_groups": groups, "ignore": ["lm_head"],
    } | changes  # fmt: skip


@dataclass
class Checkpoint:
    """A directory with a quantised Llama, and the weights that it stands for."""

    path: Path
    state: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        return sum(value.numel() for value in self.state.values())


def llama_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    values: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 128,
        "tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    return LlamaConfig(**(values | changes))


def write_llama(path: Path, pack: Pack, quantization: dict[str, Any] | None, **changes: Any) -> Checkpoint:
    """Every matrix between embeddings and head packed; those two and the norms plain."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = llama_config(**changes)
    checkpoint = Checkpoint(path)
    stored: dict[str, torch.Tensor] = {}
    random = np.random.default_rng(0)
    for name, value in LlamaForCausalLM(config).state_dict().items():
        if name.endswith("_proj.weight"):
            packed = pack(random, *value.shape)
            stored |= {f"{name.removesuffix('weight')}{leaf}": part for leaf, part in packed.tensors.items()}
            checkpoint.state[name] = packed.value
        else:
            checkpoint.state[name] = stored[name] = value.clone()
    save_file(stored, path / "model.safetensors")
    values = config.to_dict()
    if quantization is not None:
        values["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(values))
    return checkpoint
