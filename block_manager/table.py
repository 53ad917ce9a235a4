"""The blocks of one sequence in one layer group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .block import Block


@dataclass(slots=True)
class BlockTable:
    """Blocks in token order: entry i belongs to tokens [i * block_size, (i + 1) * block_size), whatever has become of
    the entries before it. Those whose tokens nobody will look at any more hold the pool's reserved block instead."""

    blocks: list[Block] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    """The same as ids: the live view that batches carry."""
    num_passed: int = 0
    """Leading entries that the window has passed: the reserved block stands there."""
    num_published: int = 0
    """Leading blocks that need no further look by `publish`."""

    @property
    def held(self) -> list[Block]:
        """The blocks that the sequence has a reference to."""
        return self.blocks[self.num_passed :]

    def append(self, blocks: Sequence[Block]) -> None:
        self.blocks.extend(blocks)
        self.ids.extend([block.id for block in blocks])

    def replace(self, index: int, block: Block) -> None:
        self.blocks[index], self.ids[index] = block, block.id

    def pass_by(self, num_passed: int, null: Block) -> list[Block]:
        """Put the reserved block in place of all entries before `num_passed`; those that stood there."""
        passed = self.blocks[self.num_passed : num_passed]
        for index in range(self.num_passed, num_passed):
            self.replace(index, null)
        self.num_passed = num_passed
        return passed
