"""What config.json says about quantised weights, and what of it is refused. Torch-free.

Formats: AutoAWQ's "gemm", AutoGPTQ's and GPTQModel's "gptq" and "gptq_v2", transformers' fine-grained and FBGEMM fp8,
and compressed-tensors' int-, float-, naive- and pack-quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from ..spec import ModelError

Method = Literal["awq", "gptq", "fp8", "compressed-tensors"]

_METHODS: dict[str, Method] = {
    "awq": "awq",
    "gptq": "gptq",
    "fp8": "fp8",
    # The same tensors as fp8 with a scale per channel.
    "fbgemm_fp8": "fp8",
    "compressed-tensors": "compressed-tensors",
}
_COMPRESSED_FORMATS = (
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "pack-quantized",
    "mixed-precision",
    "dense",
)
_COMPRESSED_BITS = {"int": (2, 4, 8), "float": (8,)}
_MEND = "use the unquantised model, a GGUF file of it, or one quantised with awq, gptq, fp8 or compressed-tensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How a checkpoint's weights are packed, as far as the tensors themselves do not tell."""

    method: Method
    bits: tuple[int, ...] = ()
    """Of one code, as stated; several where modules differ."""
    group_size: int | None = None
    """Inputs that share a scale (GPTQ). None: all of them, or not stated."""
    zero_offset: int = 0
    """To add to a stored zero point: GPTQ's first format stores one less than it means."""
    blocks: tuple[tuple[int, int], ...] = ()
    """Stated (outputs, inputs) that share a scale; several where modules differ."""


def read_quantization(config: Mapping[str, Any], where: str) -> Quantization | None:
    """None for a model that is not quantised. `config`: config.json's object; `where`: its name, for messages.

    Raises ModelError for methods and variants that cannot be dequantised here.
    """
    stated = config.get("quantization_config") or config.get("compression_config")
    if not stated:
        return None
    if not isinstance(stated, dict):
        raise ModelError(f"{where}: quantization_config should be an object; download the model again")
    return _Stated(stated, where).read()


class _Stated:
    """The object quantization_config."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    def _refuse(self, what: str, known: str = "") -> NoReturn:
        """`known`: what is supported instead of a variant."""
        note = f" ({known})" if known else ""
        raise ModelError(f"{self._where}: the weights are quantised with {what}, which is not supported{note}; {_MEND}")

    def read(self) -> Quantization:
        method = _METHODS.get(self._method())
        if method is None:
            self._refuse(f"{_quoted(self._method())}")
        if method == "awq":
            return self._awq()
        if method == "gptq":
            return self._gptq()
        return self._fp8() if method == "fp8" else self._compressed_tensors()

    def _method(self) -> str:
        method = self._values.get("quant_method")
        if method is None and (self._values.get("load_in_8bit") or self._values.get("load_in_4bit")):
            return "bitsandbytes"  # its first releases did not write their name
        if method is None and "config_groups" in self._values:
            return "compressed-tensors"  # nor did sparseml
        if not isinstance(method, str):
            raise ModelError(f"{self._where}: quantization_config has no quant_method; download the model again")
        return method.lower()

    def _sizes(self, value: Any, what: str) -> int:
        """A positive integer, or a ModelError."""
        if type(value) is not int or value <= 0:
            raise ModelError(
                f"{self._where}: quantization_config has {what} {_quoted(value)}; download the model again"
            )
        return value

    def _group_size(self, value: Any) -> int | None:
        """-1 and null mean that all inputs share a scale."""
        return None if value is None or value == -1 else self._sizes(value, "group_size")

    def _formats(self) -> set[str]:
        """What the several keys for a packing's name say."""
        keys = ("version", "format", "checkpoint_format")
        return {str(self._values[key]).lower() for key in keys if self._values.get(key) is not None}

    def _awq(self) -> Quantization:
        other = sorted(self._formats() - {"gemm"})
        if other or self._values.get("backend") == "llm-awq":
            self._refuse(f"AWQ in the packing {_quoted((other or ['llm-awq'])[0])}", "gemm is")
        bits = self._values.get("bits", self._values.get("w_bit", 4))
        if bits != 4:
            self._refuse(f"AWQ in {_quoted(bits)} bits", "4 are")
        return Quantization(method="awq", bits=(4,))

    def _gptq(self) -> Quantization:
        formats = self._formats() or {"gptq"}
        if self._values.get("is_marlin_format") is True:
            formats = {"marlin"}
        other = sorted(formats - {"gptq", "gptq_v2"})
        if other:
            self._refuse(f"GPTQ in the packing {_quoted(other[0])}", "gptq and gptq_v2 are")
        if self._values.get("pack_dtype", "int32") != "int32":
            self._refuse(f"GPTQ packed in {_quoted(self._values['pack_dtype'])}", "int32 is")
        bits = self._values.get("bits")
        if bits is not None and (type(bits) is not int or bits not in (2, 3, 4, 8)):
            self._refuse(f"GPTQ in {_quoted(bits)} bits", "2, 3, 4 and 8 are")
        return Quantization(
            method="gptq",
            bits=(bits,) if bits is not None else (),
            group_size=self._group_size(self._values.get("group_size")),
            zero_offset=0 if "gptq_v2" in formats else 1,
        )

    def _fp8(self) -> Quantization:
        if self._values.get("scale_fmt", "float") not in ("float", "ue8m0", None):
            self._refuse(f"fp8 and scales of the kind {_quoted(self._values['scale_fmt'])}")
        if self._values.get("expert_dtype", "fp8") != "fp8":
            self._refuse(f"fp8 and experts in {_quoted(self._values['expert_dtype'])}", "fp8 is")
        return Quantization(method="fp8", bits=(8,), blocks=self._block(self._values.get("weight_block_size")))

    def _block(self, sizes: Any) -> tuple[tuple[int, int], ...]:
        """Block sizes, [rows, columns], as a tuple of none or one."""
        if sizes is None:
            return ()
        if isinstance(sizes, str) and all(part.isdecimal() for part in sizes.split("x")):
            sizes = [int(part) for part in sizes.split("x")]  # compressed-tensors once wrote "128x128"
        if not isinstance(sizes, list) or len(sizes) != 2:
            raise ModelError(
                f"{self._where}: quantization_config has a block size of {_quoted(sizes)}; download the model again"
            )
        return ((self._sizes(sizes[0], "a block size of"), self._sizes(sizes[1], "a block size of")),)

    def _compressed_tensors(self) -> Quantization:
        self._refuse_compressed_extras()
        groups = self._values.get("config_groups") or {}
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise ModelError(f"{self._where}: config_groups should be an object of objects; download the model again")
        formats = [self._values.get("format"), *(group.get("format") for group in groups.values())]
        for name in formats:
            if name is not None and name not in _COMPRESSED_FORMATS:
                self._refuse(f"compressed-tensors in the format {_quoted(name)}")
        bits: list[int] = []
        blocks: list[tuple[int, int]] = []
        for group in groups.values():
            weights = group.get("weights")
            if isinstance(weights, dict):
                bits.append(self._compressed_bits(weights))
                blocks += self._compressed_blocks(weights)
        return Quantization(
            method="compressed-tensors", bits=tuple(dict.fromkeys(bits)), blocks=tuple(dict.fromkeys(blocks))
        )

    def _refuse_compressed_extras(self) -> None:
        sparsity = self._values.get("sparsity_config")
        if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
            self._refuse(f"compressed-tensors and sparse as {_quoted(sparsity['format'])}")
        if self._values.get("transform_config"):
            self._refuse("compressed-tensors and rotated (transform_config)")
        status = self._values.get("quantization_status")
        if status not in (None, "compressed"):
            raise ModelError(
                f"{self._where}: the weights were saved while {_quoted(status)}, before they were compressed; "
                "save the model again with save_compressed=True, or use the unquantised one"
            )

    def _compressed_bits(self, weights: Mapping[str, Any]) -> int:
        kind, bits = weights.get("type", "int"), weights.get("num_bits", 8)
        if type(bits) is not int or bits not in _COMPRESSED_BITS.get(str(kind), ()):
            self._refuse(f"compressed-tensors in {_quoted(f'{kind}{bits}')}", "int2, int4, int8 and float8 are")
        if weights.get("strategy") not in (None, "tensor", "channel", "group", "block"):
            self._refuse(f"compressed-tensors and the strategy {_quoted(weights.get('strategy'))}")
        return bits

    def _compressed_blocks(self, weights: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
        group_size = self._group_size(weights.get("group_size"))
        return self._block(weights.get("block_structure")) + (((1, group_size),) if group_size is not None else ())


def _quoted(value: Any) -> str:
    return repr(str(value)[:40])
