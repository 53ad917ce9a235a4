"""Which keys and values each layer keeps, and what a sequence of so many tokens therefore takes. Torch-free.

A layer that attends to a window only needs the K/V of that window. Its blocks are then those of the window, and one
more: a window that does not begin at a block's edge reaches into it.

    tokens   ········├────── window ──────┤
    blocks   │···████│████████│████████│██  │      ⌈window / block⌉ + 1

While a step computes a part of its prompt, it holds the blocks of that part as well; all sequences of a step share one
budget of tokens.
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
        """Blocks of this layer that a sequence of so many tokens holds once it decodes."""
        blocks = -(-num_tokens // block_size)
        return blocks if self.window is None else min(blocks, -(-self.window // block_size) + 1)

    def blocks_of_sequences(self, num_seqs: int, num_tokens: int, block_size: int, step_tokens: int) -> int:
        """Blocks of this layer that so many sequences of `num_tokens` each hold at most at any time, where a step
        computes `step_tokens` at most."""
        blocks = num_seqs * -(-num_tokens // block_size)
        if self.window is None:
            return blocks
        return min(blocks, num_seqs * self.blocks_of_sequence(num_tokens, block_size) + -(-step_tokens // block_size))


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers of one kind: they can share block tables."""

    layer: KvLayer
    layer_ids: tuple[int, ...]

    def block_bytes(self, block_size: int, itemsize: int) -> int:
        """K and V of `block_size` tokens, all layers of the group."""
        return block_size * itemsize * len(self.layer_ids) * self.layer.values_per_token


@dataclass(frozen=True, slots=True)
class KvLayout:
    """All layers that keep K/V, by kind: those that see everything first. A layer that reads another's is in no group.
    Each group has a pool of its own, since its sequences hold a number of blocks of their own."""

    groups: tuple[KvGroup, ...]

    @property
    def num_layers(self) -> int:
        return sum(len(group.layer_ids) for group in self.groups)

    @property
    def is_windowed(self) -> bool:
        return any(group.layer.window is not None for group in self.groups)

    def block_bytes(self, block_size: int, itemsize: int) -> int:
        """K and V of `block_size` tokens, all layers."""
        return sum(group.block_bytes(block_size, itemsize) for group in self.groups)

    def sequence_bytes(self, num_tokens: int, block_size: int, itemsize: int) -> int:
        """The blocks that one sequence of so many tokens holds, windowed layers counted as such."""
        return sum(
            group.layer.blocks_of_sequence(num_tokens, block_size) * group.block_bytes(block_size, itemsize)
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
    """Layers in the model's order; groups are those without a window first, then by their windows, then in the order of
    their first layers."""
    members: dict[KvLayer, list[int]] = {}
    for index, layer in enumerate(layers):
        members.setdefault(layer, []).append(index)
    groups = [KvGroup(layer, tuple(ids)) for layer, ids in members.items()]
    return KvLayout(tuple(sorted(groups, key=lambda group: group.layer.window or 0)))


def kv_layout(spec: ModelSpec) -> KvLayout:
    """Of a model that this release serves: layers alike but for their windows."""
    return group_layers(
        [
            KvLayer(spec.num_key_value_heads, spec.head_dim, spec.head_dim, spec.window(index) or None)
            for index in range(spec.num_hidden_layers)
        ]
    )
