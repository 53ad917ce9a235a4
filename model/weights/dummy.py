"""Random weights of the right shapes, for a model of which only config.json is there.

What such a model says is noise, and what it costs is what the real one costs: for measuring, and for trying out what
stands in front of a model without downloading one.

Drawing every value would take minutes where copying takes seconds. So one block of values is drawn, and each matrix
reads it round and round from a place of its own:

    block    ├─────────────── P values ───────────────┤      P is a prime, so that no two rows of a matrix, whose
    matrix        row 0 │ row 1 │ row 2 │ … │ row n ↩        width is never a multiple of it, begin at the same place

The place follows from the tensor's name, so that a tensor's values do not depend on which others are read.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from hashlib import blake2b
from pathlib import Path

import torch

from ..config import ModelImpl
from ..registry import family_of
from ..spec import ModelError, ModelSpec
from .layout import check_spec
from .model_spec import read_model_spec

_BLOCK_VALUES = 4194301
"""The largest prime below 2**22."""
_STANDARD_DEVIATION = 0.02
"""transformers' initializer_range: activations neither vanish nor overflow, whatever the depth."""


class _Block:
    """The drawn values, in every dtype that was asked for."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(_BLOCK_VALUES, generator=generator) * _STANDARD_DEVIATION
        self._values = {torch.bfloat16: drawn.to(torch.bfloat16)}

    def read(self, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """`count` values from `start` on, beginning again at the block's end. A fresh tensor [count]."""
        values = self._values.get(dtype)
        if values is None:
            values = self._values[dtype] = self._values[torch.bfloat16].to(dtype)
        out = torch.empty(count, dtype=dtype)
        done = 0
        while done < count:
            first = (start + done) % _BLOCK_VALUES
            length = min(count - done, _BLOCK_VALUES - first)
            out[done : done + length] = values[first : first + length]
            done += length
        return out


class DummyWeight:
    """See `kernels.weights.StoredWeight`, which this satisfies: as if a file held the values in bfloat16.

    Norms are 1, biases 0, everything else is normal with a standard deviation of 0.02.
    """

    encoding = "BF16"

    def __init__(self, name: str, shape: tuple[int, ...], block: _Block) -> None:
        self.name = name
        self.shape = shape
        self._block = block

    def raw(self) -> torch.Tensor:
        """uint8 [prod(shape[:-1]), bytes_per_row]; a fresh tensor, since nothing is stored."""
        return self.dequantize(torch.bfloat16).view(math.prod(self.shape[:-1]), -1).view(torch.uint8)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The values in `dtype`. CPU, contiguous, `shape`; a fresh tensor."""
        if self.name.endswith(".bias"):
            return torch.zeros(self.shape, dtype=dtype)
        if len(self.shape) == 1:
            return torch.ones(self.shape, dtype=dtype)
        start = int.from_bytes(blake2b(self.name.encode(), digest_size=8).digest(), "little") % _BLOCK_VALUES
        return self._block.read(start, math.prod(self.shape), dtype).view(self.shape)


class DummySource:
    """A `WeightSource` of everything that the spec's family reads. Equal seeds give equal weights."""

    def __init__(self, spec: ModelSpec, seed: int = 0) -> None:
        """Raises ModelError for an architecture that no family here implements."""
        self.spec = spec
        self._shapes = dict(family_of(spec).parameters(spec))
        self._block = _Block(seed)

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def weight(self, name: str) -> DummyWeight:
        """Raises ModelError naming the tensor if the family does not read it."""
        shape = self._shapes.get(name)
        if shape is None:
            raise ModelError(f"a {self.spec.architecture} has no tensor {name}")
        return DummyWeight(name, shape, self._block)

    def close(self) -> None:
        """As the sources of files have it; there is nothing to let go of."""


def open_dummy(directory: Path, model_impl: ModelImpl = "auto") -> DummySource:
    """For a directory with config.json; weights that lie beside it are not looked at. Raises ModelError."""
    spec = read_model_spec(directory, None, model_impl)
    check_spec(spec, directory)
    return DummySource(spec)
