"""All blocks of one layer group: reference counts, the prefix index, and eviction. No torch: ids only."""

from __future__ import annotations

from collections.abc import Iterable

from .block import Block, FreeBlockList
from .evicted import EvictedHashes

NULL_BLOCK_ID = 0
"""Reserved: padding of block tables points here, and so do entries whose block has left the window. Nobody owns it."""


EVICTED_HASHES_PER_BLOCK = 4
"""How far back an eviction is remembered, in multiples of the pool."""


class OutOfBlocks(Exception):
    """The pool holds fewer free blocks than were asked for. Nothing was changed."""


class BlockPool:
    """Blocks 1 … num_blocks − 1, each either free or referenced by at least one table."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError("a pool needs at least two blocks: one is reserved")
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        self.free_list = FreeBlockList()
        for block in self.blocks[1:]:
            self.free_list.push_back(block)
        self.index: dict[bytes, Block] = {}
        self.evicted = EvictedHashes(EVICTED_HASHES_PER_BLOCK * num_blocks)
        """Hashes that were in the index until their block was reused, and have not come back since."""
        self.num_evicted = 0
        """Running total of published blocks that were reused for other contents."""
        self.num_cached_free = 0
        """Free blocks that still bear a hash."""
        self.num_shared = 0
        """Blocks that more than one table refers to."""

    @property
    def null(self) -> Block:
        return self.blocks[NULL_BLOCK_ID]

    @property
    def num_usable(self) -> int:
        return len(self.blocks) - 1

    @property
    def num_free(self) -> int:
        return len(self.free_list)

    def allocate(self, count: int) -> list[Block]:
        """`count` blocks with one reference each, without hash. Raises OutOfBlocks."""
        if count > len(self.free_list):
            raise OutOfBlocks(f"{count} blocks asked for, {len(self.free_list)} free")
        taken = []
        for _ in range(count):
            block = self.free_list.pop_front()
            if block.hash is not None:
                self._evict(block, block.hash)
            block.ref_count = 1
            taken.append(block)
        return taken

    def acquire(self, blocks: Iterable[Block]) -> None:
        """One more reference to each; free blocks come back to life with their contents."""
        for block in blocks:
            if block.ref_count == 0:
                self.free_list.remove(block)
                if block.hash is not None:
                    self.num_cached_free -= 1
            elif block.ref_count == 1:
                self.num_shared += 1
            block.ref_count += 1

    def release(self, blocks: Iterable[Block]) -> None:
        """One reference less to each. What is released first is reused first: give the last block of a table first,
        for a prefix is worth nothing without its beginning. Raises ValueError for a block that is free already."""
        for block in blocks:
            if block.ref_count <= 0:
                raise ValueError(f"{block!r} is released more often than it was taken")
            block.ref_count -= 1
            if block.ref_count == 1:
                self.num_shared -= 1
            elif block.ref_count == 0:
                if block.hash is None:
                    self.free_list.push_front(block)
                else:
                    self.num_cached_free += 1
                    self.free_list.push_back(block)

    def lookup(self, block_hash: bytes, parent_hash: bytes, tokens: bytes) -> Block | None:
        """The published block with this hash, if its tokens and its parent really are the same."""
        block = self.index.get(block_hash)
        if block is None or block.token_bytes != tokens or block.parent_hash != parent_hash:
            return None
        return block

    def was_published(self, block_hash: bytes) -> bool:
        """Whether a block with this hash is findable, or was until it was evicted not too long ago."""
        return block_hash in self.index or block_hash in self.evicted

    def publish(self, block: Block, block_hash: bytes, parent_hash: bytes, tokens: bytes) -> None:
        """Make a full, written block findable. If an equal one is known already, this one stays private."""
        if block.hash is not None or block_hash in self.index:
            return
        block.hash, block.parent_hash, block.token_bytes = block_hash, parent_hash, tokens
        self.index[block_hash] = block
        self.evicted.discard(block_hash)

    def withdraw(self, block_hashes: Iterable[bytes]) -> None:
        """As if blocks with these hashes had never been published; active ones stay with their owners."""
        for block_hash in block_hashes:
            self.evicted.discard(block_hash)
            if (block := self.index.get(block_hash)) is not None:
                self.num_cached_free -= block.ref_count == 0
                self._unpublish(block)

    def _evict(self, block: Block, block_hash: bytes) -> None:
        """A free published block is about to hold something else."""
        self.evicted.add(block_hash)
        self.num_evicted += 1
        self.num_cached_free -= 1
        self._unpublish(block)

    def _unpublish(self, block: Block) -> None:
        assert block.hash is not None
        del self.index[block.hash]
        block.hash = block.parent_hash = block.token_bytes = None
