"""The header of a GGUF file (versions 2 and 3), read from mapped memory and checked before anything is allocated.

Follows the format's specification in the ggml repository. Torch-free and numpy-free. Every way in which a header can
be wrong ends in a ModelError of one line.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, overload

from ..spec import ModelError
from .ggml_types import GGML_TYPES
from .mapping import map_file

GgufValue: TypeAlias = "bool | int | float | str | list[str] | array.array[Any]"

# Far above what real files hold, far below what would hurt: a header may lie within these and still be parsed in
# seconds and a few hundred megabytes.
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_KEY_BYTES = 1 << 16
MAX_TENSOR_NAME_BYTES = 1 << 10
MAX_STRING_BYTES = 1 << 26
MAX_ARRAY_STRINGS = 1 << 22
MAX_ARRAY_NUMBERS = 1 << 24
MAX_DIMS = 4

_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_ARRAY_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

END_PIECES = frozenset(
    {
        "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
        "<end_of_utterance>", "<EOT>", "_<EOT>", "< EOT >",
    }
)  # fmt: skip
"""What ends a turn or a text, by its name: converters often write one key of the three, and leave the token that a chat
template ends with to be found by those who serve (as llama.cpp does)."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One entry of the tensor table, already checked against the file's size."""

    name: str
    shape: tuple[int, ...]
    """As torch orders it: the slowest axis first."""
    encoding: str
    offset: int
    """From the file's start, bytes."""
    num_bytes: int


class _Header:
    """A cursor over the mapped file that never reads past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.end = len(data)
        self.position = 0

    def fail(self, what: str) -> NoReturn:
        raise ModelError(f"{self.path.name}: {what}; the file is damaged or incomplete, download it again")

    def take(self, size: int, what: str) -> int:
        """Advance over `size` bytes and return where they start."""
        start = self.position
        if size > self.end - start:
            self.fail(f"the file ends inside {what}")
        self.position = start + size
        return start

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.data, self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self.data, self.take(8, what))[0]
        return value

    def text(self, limit: int, what: str) -> str:
        size = self.u64(what)
        if size > limit:
            self.fail(f"{what} claims {size} bytes")
        start = self.take(size, what)
        # Values are shown to people or are vocabulary pieces; one odd byte must not make a model unusable.
        return self.data[start : start + size].decode("utf-8", "replace")

    def strings(self, count: int, what: str) -> list[str]:
        """The hot loop: a vocabulary and its merges are some 10⁵ strings, so it reads without a call for each."""
        if count > MAX_ARRAY_STRINGS or count * 8 > self.end - self.position:
            self.fail(f"{what} claims {count} strings")
        data, end, position = self.data, self.end, self.position
        unpack = _U64.unpack_from
        values: list[str] = []
        append = values.append
        for _ in range(count):
            if position + 8 > end:
                self.fail(f"the file ends inside {what}")
            size = unpack(data, position)[0]
            position += 8
            if size > end - position or size > MAX_STRING_BYTES:
                self.fail(f"a string of {what} claims {size} bytes")
            append(data[position : position + size].decode("utf-8", "replace"))
            position += size
        self.position = position
        return values

    def numbers(self, kind: int, count: int, what: str) -> array.array[Any]:
        values: array.array[Any] = array.array(_ARRAY_CODES[kind])
        width = _SCALARS[kind].size
        if count > MAX_ARRAY_NUMBERS or count * width > self.end - self.position:
            self.fail(f"{what} claims {count} numbers")
        start = self.take(count * width, what)
        values.frombytes(self.data[start : start + count * width])
        if sys.byteorder == "big":
            values.byteswap()
        return values

    def value(self, what: str) -> GgufValue:
        kind = self.u32(what)
        if kind == _STRING:
            return self.text(MAX_STRING_BYTES, what)
        if kind == _ARRAY:
            return self._array(what)
        if kind not in _SCALARS:
            self.fail(f"{what} has the unknown type {kind}")
        scalar = _SCALARS[kind]
        value: bool | int | float = scalar.unpack_from(self.data, self.take(scalar.size, what))[0]
        return value

    def _array(self, what: str) -> GgufValue:
        kind = self.u32(what)
        count = self.u64(what)
        if kind == _STRING:
            return self.strings(count, what)
        if kind not in _SCALARS:
            self.fail(f"{what} is an array of {'arrays' if kind == _ARRAY else f'the unknown type {kind}'}")
        return self.numbers(kind, count, what)


class GgufFile:
    """A mapped GGUF file: its metadata, its tensor table, and the bytes themselves (read-only).

    Raises ModelError where the header is wrong, and OSError never: an unreadable file is a ModelError too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = map_file(path, "give the path of a .gguf file")
        try:
            header = _Header(path, self.data)
            num_tensors, num_keys = _read_preamble(header)
            self.metadata: dict[str, GgufValue] = _read_metadata(header, num_keys)
            self.tensors: dict[str, GgufTensor] = _read_tensors(header, num_tensors, self.metadata)
            self.header_bytes = header.position
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unmap the file. Where tensors still view it, the mapping lives until the last of them is gone."""
        with contextlib.suppress(BufferError):
            self.data.close()

    @overload
    def get(self, key: str, kind: type[int], default: int) -> int: ...
    @overload
    def get(self, key: str, kind: type[int], default: None = None) -> int | None: ...
    @overload
    def get(self, key: str, kind: type[float], default: float) -> float: ...
    @overload
    def get(self, key: str, kind: type[float], default: None = None) -> float | None: ...
    @overload
    def get(self, key: str, kind: type[str], default: str) -> str: ...
    @overload
    def get(self, key: str, kind: type[str], default: None = None) -> str | None: ...
    def get(self, key: str, kind: type[Any], default: Any = None) -> Any:
        """A scalar of the metadata, `default` where absent. Raises ModelError where it has another type."""
        value = self.metadata.get(key)
        if value is None:
            return default
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind):
            raise ModelError(
                f"{self.path.name}: {key} should be of type {kind.__name__}; convert the model to GGUF again"
            )
        return value

    def require(self, key: str) -> int:
        """An integer without which the model has no shape. Raises ModelError where it is absent."""
        value = self.get(key, int)
        if value is None:
            raise ModelError(f"{self.path.name}: the metadata lacks {key}; convert the model to GGUF again")
        return value

    def strings(self, key: str) -> list[str] | None:
        """An array of strings, None where absent. Raises ModelError where it is something else."""
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, list):
            raise ModelError(f"{self.path.name}: {key} should be an array of strings; convert the model to GGUF again")
        return value


def _read_preamble(header: _Header) -> tuple[int, int]:
    """(number of tensors, number of metadata keys), both within the file's means."""
    name = header.path.name
    magic = header.data[:4]
    if magic != b"GGUF":
        raise ModelError(f"{name} is not a GGUF file (it begins with {magic!r}); give a .gguf file")
    header.take(4, "its first bytes")
    version = header.u32("the version")
    if version not in (2, 3):
        if version & 0xFFFF == 0:
            raise ModelError(
                f"{name}: big-endian GGUF files are not supported; convert the model on a little-endian machine"
            )
        raise ModelError(f"{name}: GGUF version {version} is not supported (2 and 3 are); convert the model again")
    num_tensors = header.u64("the number of tensors")
    num_keys = header.u64("the number of metadata keys")
    remaining = header.end - header.position
    # The smallest tensor entry takes 32 bytes, the smallest key 13.
    if num_tensors > MAX_TENSORS or num_tensors * 32 > remaining:
        header.fail(f"the header claims {num_tensors} tensors")
    if num_keys > MAX_KEYS or num_keys * 13 > remaining:
        header.fail(f"the header claims {num_keys} metadata keys")
    return num_tensors, num_keys


def _read_metadata(header: _Header, num_keys: int) -> dict[str, GgufValue]:
    metadata: dict[str, GgufValue] = {}
    for index in range(num_keys):
        key = header.text(MAX_KEY_BYTES, f"metadata key {index}")
        if key in metadata:
            header.fail(f"the metadata key {key[:100]!r} appears twice")
        metadata[key] = header.value(f"the value of {key[:100]!r}")
    return metadata


def _read_tensors(header: _Header, num_tensors: int, metadata: dict[str, GgufValue]) -> dict[str, GgufTensor]:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        header.fail(f"the alignment {str(alignment)[:40]} is not a power of two")
    entries = [_read_tensor_entry(header, index) for index in range(num_tensors)]
    data_start = -(-header.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for entry in entries:
        if entry.name in tensors:
            header.fail(f"the tensor {entry.name!r} appears twice")
        if entry.offset % alignment:
            header.fail(f"the tensor {entry.name!r} is not aligned to {alignment} bytes")
        start = data_start + entry.offset
        if start + entry.num_bytes > header.end:
            header.fail(f"the data of tensor {entry.name!r} lies past the end of the file")
        tensors[entry.name] = GgufTensor(entry.name, entry.shape, entry.encoding, start, entry.num_bytes)
    return tensors


def _read_tensor_entry(header: _Header, index: int) -> GgufTensor:
    """One entry, with its offset still relative to the start of the data."""
    name = header.text(MAX_TENSOR_NAME_BYTES, f"the name of tensor {index}")
    what = f"the entry of tensor {name[:100]!r}"
    num_dims = header.u32(what)
    if not 1 <= num_dims <= MAX_DIMS:
        header.fail(f"{what} claims {num_dims} dimensions")
    dims = [header.u64(what) for _ in range(num_dims)]
    kind = GGML_TYPES.get(type_id := header.u32(what))
    if kind is None:
        raise ModelError(
            f"{header.path.name}: tensor {name[:100]!r} has the encoding number {type_id}, which is not supported; "
            "use another quantisation of the model"
        )
    offset = header.u64(what)
    num_values = 1
    for dim in dims:
        if dim == 0:
            header.fail(f"{what} has a dimension of zero")
        num_values *= dim  # Python's integers do not wrap, so the comparison with the file's size below is exact
    if dims[0] % kind.block_size:
        header.fail(f"{what}: rows of {dims[0]} values do not divide into {kind.name} blocks of {kind.block_size}")
    num_bytes = num_values // kind.block_size * kind.block_bytes
    return GgufTensor(name, tuple(reversed(dims)), kind.name, offset, num_bytes)
