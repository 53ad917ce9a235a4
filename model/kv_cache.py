"""The pools of K/V blocks: one allocation for each layer group.

    pool [num_layers of the group, num_blocks, 2, num_kv_heads, block_size, head_dim]
                                   block 0     K then V
                                   is nobody's

Block 0 is never given to a sequence: block tables are padded with it, so that a padded read is a legal one, and have it
where a window has passed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from .kv_layout import kv_layout
from .memory import CachePlan
from .spec import ModelSpec

_ALIGNMENT_BYTES = 64


def bytes_per_block(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """K and V of `block_size` tokens, all layers."""
    return kv_layout(spec).block_bytes(block_size, dtype.itemsize)


def allocate_pools(
    spec: ModelSpec, plan: CachePlan, block_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """A zeroed pool for each layer group, in the order of `kv_layout`."""
    return tuple(
        _zeros(
            (len(group.layer_ids), pool.num_blocks, 2, spec.num_key_value_heads, block_size, spec.head_dim),
            dtype,
            device,
        )
        for group, pool in zip(kv_layout(spec).groups, plan.pools, strict=True)
    )


def layers_of(spec: ModelSpec, pools: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each layer's part of its pool, in the model's order. [num_blocks, 2, num_kv_heads, block_size, head_dim]"""
    layers = {
        layer_id: layer
        for group, pool in zip(kv_layout(spec).groups, pools, strict=True)
        for layer_id, layer in zip(group.layer_ids, pool.unbind(), strict=True)
    }
    return [layers[layer_id] for layer_id in range(spec.num_hidden_layers)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device) if device.type != "cpu" else _lazy_zeros(shape, dtype)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that cost nothing until used: numpy allocates with calloc, so the kernel zeroes each page on its first
    touch, where torch.zeros would write gigabytes at start."""
    num_bytes = math.prod(shape) * dtype.itemsize
    flat = np.zeros(num_bytes + _ALIGNMENT_BYTES, dtype=np.uint8)
    start = -flat.ctypes.data % _ALIGNMENT_BYTES
    return torch.from_numpy(flat[start : start + num_bytes]).view(dtype).view(shape)
