"""GGUF headers: what is read, and that no crafted file gets past a ModelError or makes a big allocation."""

from __future__ import annotations

import struct
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.model.spec import ModelError
from octavo.model.weights.ggml_types import GGML_TYPES
from octavo.model.weights.gguf_file import GgufFile
from octavo.model.weights.gguf_source import open_gguf
from weight_files import write_llama_gguf

U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return U64(len(data)) + data


def header(tensors: int, keys: int, version: int = 3) -> bytes:
    return b"GGUF" + U32(version) + U64(tensors) + U64(keys)


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + U32(len(dims)) + b"".join(map(U64, dims)) + U32(kind) + U64(offset)


def padded(data: bytes, more: int = 0) -> bytes:
    return data + b"\0" * (-len(data) % 32) + b"\0" * more


def read(tmp_path: Path, data: bytes) -> GgufFile:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    return GgufFile(path)


def test_table_equals_ggufs() -> None:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    for number, kind in GGML_TYPES.items():
        known = GGMLQuantizationType(number)
        assert (kind.name, (kind.block_size, kind.block_bytes)) == (known.name, GGML_QUANT_SIZES[known])


@pytest.mark.parametrize("version", [2, 3])
def test_reads_every_value_type(tmp_path: Path, version: int) -> None:
    values = [
        (0, b"\xff", 255),
        (1, b"\xff", -1),
        (4, U32(7), 7),
        (5, b"\xff" * 4, -1),
        (6, struct.pack("<f", 1.5), 1.5),
        (7, b"\x01", True),
        (8, text("héllo"), "héllo"),
        (10, U64(1 << 63), 1 << 63),
        (12, struct.pack("<d", 0.1), 0.1),
    ]
    data = header(1, len(values) + 2, version)
    data += b"".join(text(f"k{index}") + U32(kind) + raw for index, (kind, raw, _) in enumerate(values))
    data += text("strings") + U32(9) + U32(8) + U64(2) + text("a") + text("")
    data += text("numbers") + U32(9) + U32(5) + U64(2) + struct.pack("<ii", -3, 4)
    file = read(tmp_path, padded(data + tensor("w", [4, 2])) + b"\0" * 32)
    assert [file.metadata[f"k{index}"] for index in range(len(values))] == [value for _, _, value in values]
    assert file.strings("strings") == ["a", ""]
    assert list(file.metadata["numbers"]) == [-3, 4]  # type: ignore[arg-type]
    entry = file.tensors["w"]
    assert (entry.shape, entry.encoding, entry.num_bytes, entry.offset % 32) == ((2, 4), "F32", 32, 0)


CRAFTED = {
    "empty": b"",
    "short": b"GG",
    "magic": b"GGML" + b"\0" * 40,
    "version 1": header(0, 0, 1),
    "version 9": header(0, 0, 9),
    "big endian": header(0, 0, 3 << 24),
    "tensor count": header(1 << 60, 0) + b"\0" * 64,
    "key count": header(0, 1 << 60) + b"\0" * 64,
    "truncated": header(0, 1) + U64(3) + b"key" + U32(4),
    "key length": header(0, 1) + U64(1 << 62) + b"\0" * 64,
    "string length": header(0, 1) + text("k") + U32(8) + U64(1 << 40) + b"\0" * 64,
    "string length near 2^64": header(0, 1) + text("k") + U32(8) + b"\xff" * 8 + b"\0" * 64,
    "value type": header(0, 1) + text("k") + U32(77) + b"\0" * 64,
    "array type": header(0, 1) + text("k") + U32(9) + U32(77) + U64(1) + b"\0" * 64,
    "array of arrays": header(0, 1) + text("k") + U32(9) + U32(9) + U64(1) + b"\0" * 64,
    "array count": header(0, 1) + text("k") + U32(9) + U32(4) + U64(1 << 61) + b"\0" * 64,
    "string array count": header(0, 1) + text("k") + U32(9) + U32(8) + U64(1 << 61) + b"\0" * 64,
    "string in array": header(0, 1) + text("k") + U32(9) + U32(8) + U64(1) + U64(1 << 50) + b"\0" * 64,
    "duplicate key": header(0, 2) + (text("k") + U32(7) + b"\1") * 2 + b"\0" * 64,
    "alignment 0": header(0, 1) + text("general.alignment") + U32(4) + U32(0) + b"\0" * 64,
    "alignment 48": header(0, 1) + text("general.alignment") + U32(4) + U32(48) + b"\0" * 64,
    "alignment text": header(0, 1) + text("general.alignment") + U32(8) + text("x") + b"\0" * 64,
    "no dimensions": padded(header(1, 0) + tensor("w", []), 64),
    "five dimensions": padded(header(1, 0) + tensor("w", [1] * 5), 64),
    "zero dimension": padded(header(1, 0) + tensor("w", [4, 0]), 64),
    "product overflows": padded(header(1, 0) + tensor("w", [1 << 32, 1 << 32]), 64),
    "past the end": padded(header(1, 0) + tensor("w", [64]), 64),
    "offset past the end": padded(header(1, 0) + tensor("w", [4], offset=1 << 40), 64),
    "offset near 2^64": padded(header(1, 0) + tensor("w", [4], offset=(1 << 64) - 32), 64),
    "misaligned": padded(header(1, 0) + tensor("w", [4], offset=8), 64),
    "unknown encoding": padded(header(1, 0) + tensor("w", [4], kind=99), 64),
    "removed encoding": padded(header(1, 0) + tensor("w", [32], kind=4), 64),
    "partial block": padded(header(1, 0) + tensor("w", [33], kind=8), 128),
    "duplicate tensor": padded(header(2, 0) + tensor("w", [4]) * 2, 64),
    "tensor name": padded(header(1, 0) + tensor("w" * 5000, [4]), 64),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_header_is_one_clear_line(tmp_path: Path, name: str) -> None:
    tracemalloc.start()
    with pytest.raises(ModelError) as caught:
        read(tmp_path, CRAFTED[name])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert peak < 4 << 20


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_llama_gguf(tmp_path_factory.mktemp("valid") / "tiny.gguf").read_bytes()


def open_all(data: bytes) -> None:
    """Open, then touch every weight, as a loader would."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzz.gguf"
        path.write_bytes(data)
        try:
            source = open_gguf(path)
            for name in source.names():
                source.weight(name).raw()
            source.close()
        except ModelError as error:
            message = str(error)
        else:
            message = ""
    assert "\n" not in message


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_mutated_headers_fail_clearly_or_open(valid: bytes, data: st.DataObject) -> None:
    mutable = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, 2600))
        piece = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8, U64(1 << 40)]))
        mutable[start : start + len(piece)] = piece
    tracemalloc.start()
    open_all(bytes(mutable))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, 4000))
def test_truncated_files_fail_clearly(valid: bytes, cut: int) -> None:
    open_all(valid[:cut])
