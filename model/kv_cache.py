"""The pool of K/V blocks: one allocation for all layers.

    pool [num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim]
                      block 0       K then V
                      is nobody's

Block 0 is never given to a sequence: block tables are padded with it, so that a padded read is a legal one.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from .kv_layout import kv_layout
from .spec import ModelSpec

_ALIGNMENT_BYTES = 64


def bytes_per_block(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """K and V of `block_size` tokens, all layers."""
    return kv_layout(spec).block_bytes(block_size, dtype.itemsize)


def allocate_pool(
    spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A zeroed pool of `num_blocks` blocks, block 0 included."""
    shape = (spec.num_hidden_layers, num_blocks, 2, spec.num_key_value_heads, block_size, spec.head_dim)
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return _lazy_zeros(shape, dtype)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that cost nothing until used: numpy allocates with calloc, so the kernel zeroes each page on its first
    touch, where torch.zeros would write gigabytes at start."""
    num_bytes = math.prod(shape) * dtype.itemsize
    flat = np.zeros(num_bytes + _ALIGNMENT_BYTES, dtype=np.uint8)
    start = -flat.ctypes.data % _ALIGNMENT_BYTES
    return torch.from_numpy(flat[start : start + num_bytes]).view(dtype).view(shape)
