"""The header of a .safetensors file, checked before any tensor is touched. Torch-free.

Follows the format's description in the safetensors repository: eight bytes of length, that much JSON, then the data.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..spec import ModelError
from .jsonfile import parse_json_object
from .mapping import map_file

# The reference implementation's own limit.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 16

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SafetensorsEntry:
    name: str
    shape: tuple[int, ...]
    dtype: str
    """As the file spells it: F32, F16, BF16, …"""
    offset: int
    """From the file's start, bytes."""
    num_bytes: int


class SafetensorsFile:
    """A mapped .safetensors file. Raises ModelError where its header is wrong or it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = map_file(path, "download the whole model again")
        try:
            self.entries = self._read_entries()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unmap the file. Where tensors still view it, the mapping lives until the last of them is gone."""
        with contextlib.suppress(BufferError):
            self.data.close()

    def _fail(self, what: str) -> NoReturn:
        raise ModelError(f"{self.path.name}: {what}; the file is damaged or incomplete, download it again")

    def _read_entries(self) -> dict[str, SafetensorsEntry]:
        size = len(self.data)
        if size < 8:
            self._fail("the file ends inside its header's length")
        header_bytes = int.from_bytes(self.data[:8], "little")
        if header_bytes > min(MAX_HEADER_BYTES, size - 8):
            self._fail(f"the header claims {header_bytes} bytes in a file of {size}")
        header = parse_json_object(self.data[8 : 8 + header_bytes], f"the header of {self.path.name}")
        header.pop("__metadata__", None)
        data_start = 8 + header_bytes
        entries = {name: self._entry(name, value, data_start, size) for name, value in header.items()}
        self._refuse_overlap(entries)
        return entries

    def _entry(self, name: str, value: Any, data_start: int, size: int) -> SafetensorsEntry:
        label = repr(name[:100])
        if not isinstance(value, dict):
            self._fail(f"the entry of tensor {label} is not an object")
        dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            self._fail(f"tensor {label} has the unknown type {str(dtype)[:40]!r}")
        if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(dim) for dim in shape):
            self._fail(f"tensor {label} has no valid shape")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
            self._fail(f"tensor {label} has no valid offsets")
        start, stop = offsets
        if not start <= stop <= size - data_start:
            self._fail(f"the data of tensor {label} lies past the end of the file")
        if stop - start != math.prod(shape) * DTYPE_BYTES[dtype]:
            self._fail(f"tensor {label} has {stop - start} bytes, which its shape and type contradict")
        return SafetensorsEntry(name, tuple(shape), dtype, data_start + start, stop - start)

    def _refuse_overlap(self, entries: dict[str, SafetensorsEntry]) -> None:
        previous_stop = 0
        for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.num_bytes)):
            if entry.num_bytes and entry.offset < previous_stop:
                self._fail(f"the data of tensor {entry.name[:100]!r} overlaps another's")
            previous_stop = max(previous_stop, entry.offset + entry.num_bytes)


def _is_size(value: Any) -> bool:
    # bool is an int to Python, and JSON's true is no size.
    return type(value) is int and 0 <= value < 1 << 63
