"""One tensor of a checkpoint, viewed in mapped memory: the concrete `StoredWeight` of both file formats."""

from __future__ import annotations

import math
import mmap
import warnings
from dataclasses import dataclass

import torch

from .dequantize import dequantize_rows


@dataclass(frozen=True, slots=True)
class MappedWeight:
    """See `kernels.weights.StoredWeight`, which this satisfies."""

    name: str
    shape: tuple[int, ...]
    encoding: str
    data: torch.Tensor
    """The tensor's bytes as the file holds them. uint8 [num_bytes], a view of mapped memory."""
    interleaved_heads: int = 0
    """Where not 0: rows come as llama.cpp permutes them for its pairwise RoPE, in this many heads, and are put back
    into Hugging Face's half-split order on reading. Whole rows move, so that works on quantised rows as well."""

    def raw(self) -> torch.Tensor:
        """The stored bytes. uint8 [prod(shape[:-1]), bytes_per_row]; a view of mapped memory unless rows move."""
        return self._rows().view(math.prod(self.shape[:-1]), -1)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The values, computed in fp32 and rounded once to `dtype`. CPU, contiguous, `shape`; a fresh tensor."""
        return dequantize_rows(self.raw(), self.encoding, dtype).view(self.shape)

    def _rows(self) -> torch.Tensor:
        if not self.interleaved_heads:
            return self.data
        # Stored: head, pair, half. Wanted: head, half, pair.
        pairs = self.shape[0] // self.interleaved_heads // 2
        stored = self.data.view(self.interleaved_heads, pairs, 2, -1)
        return stored.transpose(1, 2).contiguous()


@dataclass(frozen=True, slots=True)
class ShiftedWeight:
    """A weight to which its file's converter added `offset`, taken back on reading. See `kernels.weights.StoredWeight`;
    for vectors only, whose bytes nobody reads as they are stored."""

    stored: MappedWeight
    offset: float

    encoding = "F32"

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def raw(self) -> torch.Tensor:
        """uint8 [prod(shape[:-1]), bytes_per_row] of the fp32 values; a fresh tensor."""
        return self.dequantize(torch.float32).view(math.prod(self.shape[:-1]), -1).view(torch.uint8)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """As `MappedWeight.dequantize`."""
        return self.stored.dequantize(torch.float32).sub_(self.offset).to(dtype)


def map_bytes(data: mmap.mmap) -> torch.Tensor:
    """A read-only mapping as a tensor without a copy. uint8 [file size]; writing to it is a segmentation fault."""
    with warnings.catch_warnings():
        # torch warns that the memory is not writable. It is meant to be: no backend writes to stored weights.
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        # frombuffer keeps its argument alive but does not hold the buffer open. The memoryview does: without it,
        # closing the mapping would pull the memory out from under every weight already handed out.
        return torch.frombuffer(memoryview(data), dtype=torch.uint8)
