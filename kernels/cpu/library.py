"""The native library through ctypes: finding it, its structures, and contexts that run operators.

The structures mirror native/octavo_cpu.h and native/run.h field by field; what fields mean is said there.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import threading
from collections.abc import Sequence
from enum import IntEnum
from types import TracebackType

import torch

ISA_NAMES = ("avx2", "avxvnni", "avx512", "amx")
"""In rising order; the bits of `ov_supported`."""
_STATUS = {
    1: "this CPU, its operating system or this build lacks the instruction set",
    2: "out of memory or threads",
    3: "an operator that this instruction set has no code for",
    4: "a bad argument",
}


class OpKind(IntEnum):
    EMBED = 0
    RMS_NORM = 1
    ADD_RMS_NORM = 2
    ADD = 3
    LINEAR = 4
    GATED = 5
    ROPE_WRITE = 6
    ATTENTION = 7
    SELECT_ROWS = 8
    DRAW = 9
    CAP = 10
    MOE = 11


class Attention(ctypes.Structure):
    """OvAttention."""

    _fields_ = (
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("norm_eps", ctypes.c_float),
    )


class Op(ctypes.Structure):
    """OvOp."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out2", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("spec", ctypes.POINTER(Attention)),
        ("stride_a", ctypes.c_int64),
        ("stride_b", ctypes.c_int64),
        ("stride_out", ctypes.c_int64),
        ("stride_out2", ctypes.c_int64),
        ("n", ctypes.c_int64 * 3),
        ("f", ctypes.c_float * 2),
    )


class Group(ctypes.Structure):
    """OvGroup."""

    _fields_ = (
        ("slots", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("table_rows", ctypes.c_void_p),
    )


class Step(ctypes.Structure):
    """OvStep."""

    _fields_ = (
        ("num_tokens", ctypes.c_int64),
        ("num_logits", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("num_decode_rows", ctypes.c_int64),
        ("token_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("query_starts", ctypes.c_void_p),
        ("kv_lens", ctypes.c_void_p),
        ("groups", ctypes.POINTER(Group)),
        ("logits_indices", ctypes.c_void_p),
    )


class Draw(ctypes.Structure):
    """OvDraw."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("temperatures", "top_ks", "top_ps", "min_ps", "seeds", "positions")
    )


class Info(ctypes.Structure):
    """OvInfo."""

    _fields_ = (
        ("isa", ctypes.c_char_p),
        ("num_threads", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("scratch_bytes", ctypes.c_int64),
    )


def library_path() -> str | None:
    """Where the library is; None where none was built. OCTAVO_CPU_LIBRARY names another build (one with sanitizers)."""
    chosen = os.environ.get("OCTAVO_CPU_LIBRARY")
    if chosen:
        return chosen
    spec = importlib.util.find_spec("._native", __package__)
    return spec.origin if spec is not None else None


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The library with its functions declared; None where it is missing or cannot be loaded here."""
    path = library_path()
    if path is None:
        return None
    try:
        library = ctypes.CDLL(path)
    except OSError:
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.ov_supported.restype = ctypes.c_uint
    library.ov_supported.argtypes = []
    library.ov_create.argtypes = [ctypes.c_char_p, integer, integer, ctypes.POINTER(pointer)]
    library.ov_destroy.argtypes = [pointer]
    library.ov_destroy.restype = None
    library.ov_info.argtypes = [pointer, ctypes.POINTER(Info)]
    library.ov_info.restype = None
    for run in (library.ov_run, library.ov_start):
        run.argtypes = [pointer, pointer, ctypes.c_int64, ctypes.POINTER(Step)]
    library.ov_finish.argtypes = [pointer]
    library.ov_finish.restype = None
    return library


def supported_isas() -> tuple[str, ...]:
    """The instruction sets that work on this machine, in rising order; empty without the library."""
    library = load_library()
    if library is None:
        return ()
    bits: int = library.ov_supported()
    return tuple(name for index, name in enumerate(ISA_NAMES) if bits >> index & 1)


class NativeContext:
    """A team of threads that runs operators in one working type.

    OCTAVO_CPU_ISA lowers the instruction set where `isa` is None. Runs from several threads wait for one another. After
    a fork with nothing under way the child's copy works, on the calling thread alone. Raises RuntimeError where there
    is no library or it refuses, ValueError for a dtype other than float32 and bfloat16.
    """

    def __init__(self, dtype: torch.dtype, num_threads: int, isa: str | None = None) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"the native library computes in float32 or bfloat16, not {dtype}")
        library = load_library()
        if library is None:
            raise RuntimeError("the native library was not built")
        self.library = library
        self.dtype = dtype
        self._handle = ctypes.c_void_p()
        self._starters: set[int] = set()
        name = isa or os.environ.get("OCTAVO_CPU_ISA") or ""
        working_type = 1 if dtype is torch.bfloat16 else 0
        self.check(library.ov_create(name.encode(), num_threads, working_type, ctypes.byref(self._handle)), name)

    @property
    def handle(self) -> ctypes.c_void_p:
        """For functions of the library that take a context; raises RuntimeError once closed."""
        if not self._handle:
            raise RuntimeError("the context is closed")
        return self._handle

    def info(self) -> Info:
        info = Info()
        self.library.ov_info(self.handle, ctypes.byref(info))
        return info

    def run(self, ops: ctypes.Array[Op] | Sequence[Op], step: Step) -> None:
        """Run the operators in order. Whatever their pointers name must live until this returns."""
        array = ops if isinstance(ops, ctypes.Array) else (Op * len(ops))(*ops)
        self.settle()
        self.check(self.library.ov_run(self.handle, array, len(array), ctypes.byref(step)))

    def start(self, ops: ctypes.Array[Op], step: Step) -> None:
        """`run` in two parts: the other threads of the team begin at once, this one joins them in `finish`. Until then
        everything that is named must live and stay as it is."""
        self.settle()
        thread = threading.get_ident()
        self._starters.add(thread)  # before it is true: whatever interrupts this, nothing is forgotten
        status = self.library.ov_start(self.handle, ops, len(ops), ctypes.byref(step))
        if status:
            self._starters.discard(thread)
        self.check(status)

    def finish(self) -> None:
        """Work along, and wait for the end. Raises RuntimeError if this thread has started nothing."""
        if threading.get_ident() not in self._starters:
            raise RuntimeError("this thread has started nothing")
        self.settle()

    def settle(self) -> None:
        """Finish what this thread has started, if it was kept from that (by Ctrl-C, say)."""
        thread = threading.get_ident()
        if thread in self._starters:
            self.library.ov_finish(self.handle)
            self._starters.discard(thread)

    def close(self) -> None:
        """End the threads. Harmless a second time."""
        if self._handle:
            self.settle()
        handle, self._handle = self._handle, ctypes.c_void_p()
        if handle:
            self.library.ov_destroy(handle)

    def __enter__(self) -> NativeContext:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    def check(self, status: int, isa: str = "") -> None:
        """Raise RuntimeError for a status other than 0."""
        if status:
            about = f" ({isa})" if isa else ""
            raise RuntimeError(f"native library: {_STATUS.get(status, status)}{about}")


def supports_attention(spec: Attention) -> bool:
    """Whether attention of this shape works here."""
    return bool(_loaded().ov_attention_supported(ctypes.byref(spec)))


def attention_workspace(spec: Attention, max_kv_len: int, num_threads: int) -> int:
    """Bytes that a step's attention takes at most beside its operands, all threads together."""
    num_bytes: int = _loaded().ov_attention_workspace(ctypes.byref(spec), max_kv_len, num_threads)
    return num_bytes


def copy_blocks(pool: torch.Tensor, sources: Sequence[int], targets: Sequence[int]) -> None:
    """pool [num_layers, num_blocks, …]: targets := sources, in all layers. Raises MemoryError, before any write."""
    ids = ctypes.c_int64 * len(sources)
    layer, block = pool[0], pool[0, 0]
    status = _loaded().ov_copy_blocks(
        pool.data_ptr(), pool.shape[0], layer.nbytes, block.nbytes, ids(*sources), ids(*targets), len(sources)
    )
    if status:
        raise MemoryError(f"no memory to copy {len(sources)} blocks")


@functools.cache
def _loaded() -> ctypes.CDLL:
    library = load_library()
    if library is None:
        raise RuntimeError("the native library was not built")
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ov_attention_supported.argtypes = [ctypes.POINTER(Attention)]
    library.ov_attention_workspace.argtypes = [ctypes.POINTER(Attention), number, number]
    library.ov_attention_workspace.restype = number
    library.ov_copy_blocks.argtypes = [pointer, number, number, number, pointer, pointer, number]
    return library
