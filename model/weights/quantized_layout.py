"""Which stored tensors make up which weight, and how: from names, shapes and types in the headers.

The tensors tell most themselves, so that modules that were left alone, or quantised otherwise than the rest, need no
reading of ignore lists and patterns: a module is quantised where its codes are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import NoReturn

from ..spec import ModelError
from .jsonfile import read_json_object
from .quantized_config import Quantization, read_quantization
from .quantized_decode import Decode, decode_awq, decode_float8, decode_gptq, decode_int8, decode_packed
from .quantized_weight import QuantizedLayout, ReadTensor
from .safetensors_file import SafetensorsEntry

_FLOATS = ("F32", "F16", "BF16")
_FLOAT8 = {"F8_E4M3": "FP8-E4M3", "F8_E5M2": "FP8-E5M2"}
_GPTQ_BITS = (2, 3, 4, 8)
_PACKED_BITS = (2, 4, 8)
_ROLES = {
    "qweight": "codes", "qzeros": "zeros", "scales": "scales", "g_idx": "groups",
    "weight": "codes", "weight_scale": "scales", "weight_scale_inv": "scales", "weight_packed": "codes",
    "weight_zero_point": "zeros", "weight_g_idx": "groups", "weight_shape": "shape",
}  # fmt: skip
# Of quantised activations and K/V. Both stay in the working dtype here, so these go unread.
_UNREAD = (
    "input_scale", "input_zero_point", "input_scale_ub", "input_global_scale", "activation_scale", "output_scale",
    "output_zero_point", "q_scale", "k_scale", "v_scale", "kv_scale", "q_zero_point", "k_zero_point", "v_zero_point",
)  # fmt: skip


class QuantizedTensors:
    """The quantised weights among a checkpoint's tensors, by canonical name. Empty for a model that has none."""

    def __init__(
        self,
        quantization: Quantization | None,
        entries: Mapping[str, SafetensorsEntry],
        read: ReadTensor,
        where: str,
    ) -> None:
        """`read` is asked for tiny tensors only (weight_shape). Raises ModelError naming what does not fit together."""
        self.layouts: dict[str, QuantizedLayout] = {}
        self._hidden: set[str] = set()
        if quantization is None:
            _refuse_codes(entries, where)
            return
        codes = {"awq": ("qweight",), "gptq": ("qweight",)}.get(quantization.method, ("weight_packed", "weight"))
        for name, entry in entries.items():
            prefix, _, leaf = name.rpartition(".")
            if leaf in _UNREAD:
                self._hidden.add(name)
            elif prefix and leaf in codes and not (leaf == "weight" and entry.dtype in _FLOATS):
                module = _Module(quantization, prefix, entries, read, where)
                layout = module.layout()
                self.layouts[layout.name] = layout
                self._hidden.update(module.found.values())

    def names(self, stored: Iterable[str]) -> Collection[str]:
        """Of all weights, quantised and not; `stored`: of all tensors in the files."""
        return dict.fromkeys([*(name for name in stored if name not in self._hidden), *self.layouts]).keys()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the quantised weights: as the plain ones would have them."""
        return {name: layout.shape for name, layout in self.layouts.items()}


def open_quantized(directory: Path, entries: Mapping[str, SafetensorsEntry], read: ReadTensor) -> QuantizedTensors:
    """Of a directory whose files hold `entries`. Raises ModelError."""
    where = f"{directory.name}/config.json"
    quantization = read_quantization(read_json_object(directory / "config.json"), where)
    return QuantizedTensors(quantization, entries, read, directory.name)


def _refuse_codes(names: Iterable[str], where: str) -> None:
    packed = next((name for name in names if name.endswith((".qweight", ".weight_packed"))), None)
    if packed is not None:
        raise ModelError(
            f"{where}: tensor {packed[:100]!r} is quantised, but config.json has no quantization_config that says how; "
            "download config.json again, or use the unquantised model"
        )


class _Module:
    """The stored tensors of one quantised module, checked against each other."""

    def __init__(
        self,
        quantization: Quantization,
        prefix: str,
        entries: Mapping[str, SafetensorsEntry],
        read: ReadTensor,
        where: str,
    ) -> None:
        self._quantization = quantization
        self._name = f"{prefix}.weight"
        self._entries = entries
        self._read = read
        self._where = where
        self.found: dict[str, str] = {}
        """Stored tensors by role."""
        for leaf, role in _ROLES.items():
            name = f"{prefix}.{leaf}"
            if name in entries:
                if role in self.found:
                    self._fail(f"is stored twice, as {self.found[role][:100]} and as {name[:100]}")
                self.found[role] = name

    def layout(self) -> QuantizedLayout:
        """Raises ModelError where parts are missing or do not fit together."""
        if self._quantization.method == "awq":
            return self._awq()
        if self._quantization.method == "gptq":
            return self._gptq()
        leaf = self.found["codes"].rpartition(".")[2]
        return self._packed() if leaf == "weight_packed" else self._eight_bits()

    def _awq(self) -> QuantizedLayout:
        num_inputs, num_words = self._part("codes", ("I32",), 2)
        num_outputs = 8 * num_words
        num_groups, _ = self._part("scales", _FLOATS, 2)
        group_size = self._step(num_inputs, num_groups, ())
        self._expect("scales", (num_groups, num_outputs))
        self._expect("zeros", (num_groups, num_words), ("I32",))
        decode = partial(decode_awq, group_size=group_size)
        label = _label("AWQ-INT4", (1, group_size), (num_outputs, num_inputs))
        return self._layout((num_outputs, num_inputs), label, ("codes", "zeros", "scales"), decode)

    def _gptq(self) -> QuantizedLayout:
        num_words, num_outputs = self._part("codes", ("I32",), 2)
        has_groups = "groups" in self.found
        if has_groups:
            (num_inputs,) = self._part("groups", ("I32",), 1)
            bits = 32 * num_words // max(1, num_inputs)
        elif len(self._quantization.bits) == 1:
            bits = self._quantization.bits[0]
            num_inputs = 32 * num_words // bits
        else:
            self._fail("has no g_idx, and quantization_config states no bits, so that its shape cannot be known")
        if bits not in _GPTQ_BITS or num_inputs * bits != 32 * num_words:
            self._fail(f"has {num_words} words of codes for {num_inputs} inputs")
        num_groups, _ = self._part("scales", _FLOATS, 2)
        stated = self._quantization.group_size
        # Where g_idx says it, the size is for the label only: with desc_act groups need not be of one size.
        group_size = -(-num_inputs // num_groups) if has_groups else self._step(num_inputs, num_groups, (stated,))
        self._expect("scales", (num_groups, num_outputs))
        self._expect("zeros", (num_groups, -(-num_outputs * bits // 32)), ("I32",))
        decode = partial(decode_gptq, bits=bits, zero_offset=self._quantization.zero_offset, group_size=group_size)
        label = _label(f"GPTQ-INT{bits}", (1, group_size), (num_outputs, num_inputs))
        return self._layout((num_outputs, num_inputs), label, ("codes", "zeros", "scales", "groups"), decode)

    def _eight_bits(self) -> QuantizedLayout:
        is_compressed = self._quantization.method == "compressed-tensors"
        shape = self._part("codes", (*_FLOAT8, *(("I8",) if is_compressed else ())), 2)
        dtype = self._entries[self.found["codes"]].dtype
        block = self._block((shape[0], shape[1]))
        if dtype in _FLOAT8:
            label = _label(_FLOAT8[dtype], block, shape)
            return self._layout(shape, label, ("codes", "scales"), partial(decode_float8, block=block))
        self._check_signed_extras(shape)
        label = _label("INT8", block, shape)
        return self._layout(shape, label, ("codes", "scales", "zeros", "groups"), partial(decode_int8, block=block))

    def _packed(self) -> QuantizedLayout:
        num_outputs, num_words = self._part("codes", ("I32",), 2)
        self._expect("shape", (2,), ("I64", "I32"))
        shape: tuple[int, ...] = tuple(self._read(self.found["shape"]).tolist())
        candidates = (*self._quantization.bits, *_PACKED_BITS)
        bits = next((bits for bits in candidates if -(-shape[1] * bits // 32) == num_words), None)
        if shape[0] != num_outputs or bits is None:
            self._fail(f"has codes of {[num_outputs, num_words]} words for a weight of {list(shape)}")
        block = self._block((shape[0], shape[1]))
        self._check_signed_extras(shape, bits)
        label = _label(f"INT{bits}", block, shape)
        decode = partial(decode_packed, bits=bits, block=block)
        return self._layout(shape, label, ("codes", "scales", "zeros", "groups"), decode)

    def _layout(self, shape: tuple[int, ...], label: str, roles: tuple[str, ...], decode: Decode) -> QuantizedLayout:
        parts = {role: self.found[role] for role in roles if role in self.found}
        return QuantizedLayout(self._name, shape, label, parts, decode)

    def _fail(self, what: str) -> NoReturn:
        raise ModelError(f"{self._where}: weight {self._name[:100]} {what}; download the whole model again")

    def _part(self, role: str, dtypes: tuple[str, ...], num_dims: int) -> tuple[int, ...]:
        """The shape of a part, which must be there and of one of these types."""
        name = self.found.get(role)
        if name is None:
            self._fail(f"is quantised, but lacks its {role}")
        entry = self._entries[name]
        if entry.dtype not in dtypes or len(entry.shape) != num_dims or 0 in entry.shape:
            self._fail(f"has {role} of the type {entry.dtype} and the shape {list(entry.shape)}")
        return entry.shape

    def _expect(self, role: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = _FLOATS) -> None:
        found = self._part(role, dtypes, len(shape))
        if found != shape:
            self._fail(f"has {role} of the shape {list(found)} where {list(shape)} is asked for")

    def _block(self, shape: tuple[int, int]) -> tuple[int, int]:
        """How many (outputs, inputs) share a scale."""
        grid = self._grid()
        stated = self._quantization.blocks
        if "groups" in self.found:
            return self._step(shape[0], grid[0], ()), -(-shape[1] // grid[1])
        return (
            self._step(shape[0], grid[0], [block[0] for block in stated]),
            self._step(shape[1], grid[1], [block[1] for block in stated]),
        )

    def _grid(self) -> tuple[int, int]:
        """Of scales, (down, across)."""
        name = self.found.get("scales")
        if name is None:
            self._fail("is quantised, but lacks its scales")
        entry = self._entries[name]
        if entry.dtype not in (*_FLOATS, "F8_E8M0") or len(entry.shape) > 2 or 0 in entry.shape:
            self._fail(f"has scales of the type {entry.dtype} and the shape {list(entry.shape)}")
        down, across = (*entry.shape, 1, 1)[:2]
        return down, across

    def _step(self, size: int, count: int, stated: Iterable[int | None]) -> int:
        """How many of `size` share one of `count` scales: a stated number that fits, even one above `size`, else equal
        shares."""
        fitting = next((step for step in stated if step is not None and -(-size // step) == count), None)
        if fitting is not None:
            return fitting
        if size % count:
            self._fail(f"has {count} scales for {size} rows or columns")
        return size // count

    def _check_signed_extras(self, shape: tuple[int, ...], bits: int | None = None) -> None:
        """Zero points as the scales are, or packed down the outputs; g_idx as there are inputs."""
        if "zeros" in self.found:
            down, across = self._grid()
            entry = self._entries[self.found["zeros"]]
            if bits is not None and entry.dtype == "I32":
                self._expect("zeros", (-(-down * bits // 32), across), ("I32",))
            elif entry.dtype != "I8" or (*entry.shape, 1, 1)[:2] != (down, across):
                self._fail(f"has zeros of the type {entry.dtype} and the shape {list(entry.shape)}")
        if "groups" in self.found:
            self._expect("groups", (shape[1],), ("I32",))


def _label(kind: str, block: tuple[int, int], shape: tuple[int, ...]) -> str:
    """For people: the kind of code, and what shares a scale."""
    if block[1] == shape[1]:
        return f"{kind} per channel" if block[0] == 1 else f"{kind} per tensor"
    return f"{kind} g{block[1]}" if block[0] == 1 else f"{kind} {block[0]}x{block[1]}"
