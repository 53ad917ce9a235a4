"""Which keys and values each layer keeps, and what a sequence of so many tokens therefore takes. Torch-free.

A layer that attends to a window only needs the K/V of that window. Its blocks are then those of the window, and one
more: a window that does not begin at a block's edge reaches into it.

    tokens   ········├────── window ──────┤
    blocks   │···████│████████│████████│██  │      ⌈window / block⌉ + 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .spec import ModelSpec


@dataclass(frozen=True, slots=True)
class KvLayer:
    """One layer's keys and values."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    """The newest tokens that a query sees, itself among them. None: all there are."""

    @property
    def values_per_token(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim)

    def blocks_of_sequence(self, num_tokens: int, block_size: int) -> int:
        """Blocks of this layer that a sequence of so many tokens holds."""
        blocks = -(-num_tokens // block_size)
        return blocks if self.window is None else min(blocks, -(-self.window // block_size) + 1)


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers of one kind: they can share block tables."""

    layer: KvLayer
    layer_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KvLayout:
    """All layers that keep K/V, by kind. A layer that reads another's is in no group."""

    groups: tuple[KvGroup, ...]

    @property
    def num_layers(self) -> int:
        return sum(len(group.layer_ids) for group in self.groups)

    @property
    def is_windowed(self) -> bool:
        return any(group.layer.window is not None for group in self.groups)

    def block_bytes(self, block_size: int, itemsize: int) -> int:
        """K and V of `block_size` tokens, all layers."""
        return block_size * itemsize * sum(len(group.layer_ids) * group.layer.values_per_token for group in self.groups)

    def sequence_bytes(self, num_tokens: int, block_size: int, itemsize: int) -> int:
        """The blocks that one sequence of so many tokens holds, windowed layers counted as such."""
        return sum(
            group.layer.blocks_of_sequence(num_tokens, block_size)
            * len(group.layer_ids)
            * group.layer.values_per_token
            * block_size
            * itemsize
            for group in self.groups
        )

    def longest_sequence(self, num_bytes: int, block_size: int, itemsize: int, limit: int) -> int:
        """Tokens of the longest sequence whose blocks fit in so many bytes, `limit` at most."""
        low, high = 0, -(-limit // block_size)  # blocks: `low` fit, more than `high` are not asked for
        while low < high:
            middle = (low + high + 1) // 2
            if self.sequence_bytes(middle * block_size, block_size, itemsize) <= num_bytes:
                low = middle
            else:
                high = middle - 1
        return min(limit, low * block_size)


def group_layers(layers: Sequence[KvLayer]) -> KvLayout:
    """Layers in the model's order; groups are in the order of their first layers."""
    members: dict[KvLayer, list[int]] = {}
    for index, layer in enumerate(layers):
        members.setdefault(layer, []).append(index)
    return KvLayout(tuple(KvGroup(layer, tuple(ids)) for layer, ids in members.items()))


def kv_layout(spec: ModelSpec) -> KvLayout:
    """Of a model that this release serves: all layers alike, all attend to everything."""
    layer = KvLayer(spec.num_key_value_heads, spec.head_dim, spec.head_dim)
    return group_layers([layer] * spec.num_hidden_layers)
