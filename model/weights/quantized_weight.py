"""A weight that its file keeps in several tensors (codes, scales, zero points): the `StoredWeight` of such files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .quantized_decode import Decode, Parts
from .safetensors_file import SafetensorsEntry

ReadTensor = Callable[[str], torch.Tensor]
"""(name of a stored tensor) → it, as its file holds it; a view of mapped memory."""

TORCH_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Of the stored types that weights, or what belongs to them, come in."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """See `kernels.weights.StoredWeight`, which this satisfies but for `raw`."""

    name: str
    shape: tuple[int, ...]
    encoding: str
    """For people: "AWQ-INT4 g128". Never a name of GGML's."""
    parts: Parts
    """Views of mapped memory."""
    decode: Decode

    def raw(self) -> torch.Tensor:
        """Raises NotImplementedError: the rows of one weight lie in several tensors."""
        raise NotImplementedError(f"{self.name} ({self.encoding}) has no rows of bytes; dequantize it")

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The values, computed in fp32 and rounded once to `dtype`. CPU, contiguous, `shape`; a fresh tensor."""
        out = torch.empty(self.shape, dtype=dtype)
        self.decode(self.parts, out)
        return out


@dataclass(frozen=True, slots=True)
class QuantizedLayout:
    """Where the parts of a weight are, told from headers alone."""

    name: str
    shape: tuple[int, ...]
    encoding: str
    parts: Mapping[str, str]
    """Stored tensors by role."""
    decode: Decode

    def open(self, read: ReadTensor) -> QuantizedWeight:
        parts = {role: read(name) for role, name in self.parts.items()}
        return QuantizedWeight(self.name, self.shape, self.encoding, parts, self.decode)


def typed_view(data: torch.Tensor, entry: SafetensorsEntry) -> torch.Tensor:
    """uint8 [num_bytes] as what `entry` says it is. A view, or a copy where the file did not align the tensor."""
    dtype = TORCH_DTYPES[entry.dtype]
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(entry.shape)
