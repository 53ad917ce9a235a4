"""Weights from their file into the native library's layout (native/matrix.h), still quantised where they were."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch

from ..weights import StoredWeight
from .library import NativeContext, load_library

NATIVE_ENCODINGS = (
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
)
"""In the order of OvEncoding."""
MAX_PARTS = 16
_DENSE = {torch.float32: "F32", torch.bfloat16: "BF16"}


class _Part(ctypes.Structure):
    """OvPart."""

    _fields_ = (("encoding", ctypes.c_int64), ("num_outputs", ctypes.c_int64))


class PackedMatrix:
    """A matrix [num_outputs, num_inputs] in the library's own memory, which lives as long as this object."""

    def __init__(self, context: NativeContext, num_inputs: int, parts: Sequence[tuple[str, int]]) -> None:
        """`parts`: encoding and outputs of each. Values are rubbish until `fill`."""
        self._library = _declared(context)
        self.num_inputs = num_inputs
        self.num_outputs = sum(outputs for _, outputs in parts)
        self.encodings = tuple(encoding for encoding, _ in parts)
        self.dequantized: tuple[str, ...] = ()
        """Encodings without a form here, whose parts were turned into the working type first."""
        rows = [_Part(NATIVE_ENCODINGS.index(encoding), outputs) for encoding, outputs in parts]
        self.pointer = ctypes.c_void_p()
        """OvMatrix *, for OvOp.weight."""
        self._context = context
        array = (_Part * len(rows))(*rows)
        create = self._library.ov_matrix_create
        context.check(create(context.handle, num_inputs, array, len(rows), ctypes.byref(self.pointer)))
        self.nbytes: int = self._library.ov_matrix_bytes(self.pointer)

    def fill(self, index: int, raw: torch.Tensor) -> None:
        """Part `index` from whole rows as a file has them: contiguous bytes, [outputs, bytes per row]."""
        context = self._context
        context.check(self._library.ov_matrix_fill(context.handle, self.pointer, index, raw.data_ptr()))

    def __del__(self) -> None:
        if getattr(self, "pointer", None):
            self._library.ov_matrix_destroy(self.pointer)


class _Experts(ctypes.Structure):
    """OvExperts."""

    _fields_ = (("num_experts", ctypes.c_int64), ("gate_up", ctypes.c_void_p), ("down", ctypes.c_void_p))


class PackedExperts:
    """The experts of a layer, each matrix packed on its own."""

    def __init__(self, gate_up: Sequence[PackedMatrix], down: Sequence[PackedMatrix]) -> None:
        """gate_up[e] [2 * inner, hidden], gate above up; down[e] [hidden, inner]. Raises ValueError if experts
        differ in shape."""
        shapes = {
            (wide.num_outputs, wide.num_inputs, narrow.num_outputs, narrow.num_inputs)
            for wide, narrow in zip(gate_up, down, strict=True)
        }
        fits = len(shapes) == 1 and all(a == 2 * d and b == c for a, b, c, d in shapes)
        if not fits:
            raise ValueError(f"experts of a layer must have one shape, of two halves and their way back: {shapes}")
        self.num_experts = len(down)
        self.hidden_size = down[0].num_outputs
        self.nbytes = sum(matrix.nbytes for matrix in (*gate_up, *down))
        self._matrices = (*gate_up, *down)
        self._tables = [(ctypes.c_void_p * len(side))(*(m.pointer.value for m in side)) for side in (gate_up, down)]
        self._native = _Experts(self.num_experts, *(ctypes.addressof(table) for table in self._tables))

    @property
    def address(self) -> int:
        """OvExperts *, for OvOp.weight."""
        return ctypes.addressof(self._native)


def packed_bytes(encoding: str, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Memory that a weight will take: a matrix (an expert's has a leading 1) as `PackedMatrix` keeps it, a vector in
    fp32. Raises RuntimeError where there is no library."""
    if len(shape) < 2:
        return math.prod(shape) * 4
    kept = encoding if encoding in NATIVE_ENCODINGS else _DENSE[dtype]
    library = load_library()
    if library is None:
        raise RuntimeError("the native library was not built")
    library.ov_packed_bytes.restype = number = ctypes.c_int64
    library.ov_packed_bytes.argtypes = [ctypes.c_int, number, number, number]
    num_bytes: int = library.ov_packed_bytes(
        int(dtype is torch.bfloat16), NATIVE_ENCODINGS.index(kept), shape[-2], shape[-1]
    )
    return num_bytes


def pack_matrix(parts: Sequence[StoredWeight], context: NativeContext) -> PackedMatrix:
    """Matrices that share their input, one below the other, for products and look-ups in the context's working type.

    Parts are read one after another, and none is held beyond its turn. An encoding that the library does not know is
    dequantised to the working type. Raises ValueError if the inputs differ.
    """
    width = parts[0].shape[-1]
    if any(len(part.shape) != 2 or part.shape[1] != width for part in parts):
        raise ValueError(f"matrices of different inputs cannot be merged: {[(p.name, p.shape) for p in parts]}")
    if len(parts) > MAX_PARTS:
        raise ValueError(f"{len(parts)} matrices cannot be merged, at most {MAX_PARTS}")
    dense = _DENSE[context.dtype]
    encodings = [part.encoding if part.encoding in NATIVE_ENCODINGS else dense for part in parts]
    packed = PackedMatrix(
        context, width, [(encoding, part.shape[0]) for encoding, part in zip(encodings, parts, strict=True)]
    )
    packed.dequantized = tuple(part.encoding for part in parts if part.encoding not in NATIVE_ENCODINGS)
    for index, part in enumerate(parts):
        known = part.encoding in NATIVE_ENCODINGS
        raw = part.raw().contiguous() if known else part.dequantize(context.dtype)
        packed.fill(index, raw)
    return packed


def _declared(context: NativeContext) -> ctypes.CDLL:
    library, pointer, number = context.library, ctypes.c_void_p, ctypes.c_int64
    library.ov_matrix_create.argtypes = [pointer, number, ctypes.POINTER(_Part), number, ctypes.POINTER(pointer)]
    library.ov_matrix_destroy.argtypes = [pointer]
    library.ov_matrix_destroy.restype = None
    library.ov_matrix_bytes.argtypes = [pointer]
    library.ov_matrix_bytes.restype = number
    library.ov_matrix_fill.argtypes = [pointer, pointer, number, pointer]
    return library
