"""One block of the pool, and the list of those that are free."""

from __future__ import annotations

from collections.abc import Iterator


class Block:
    """A fixed-size slice of the K/V pool, known by its index in it.

    A block is *active* while tables refer to it (`ref_count` > 0) and *free* otherwise. A full block whose K/V are
    written may be published: it then bears a `hash` and can be found by it, active or free, until it is reused.
    """

    __slots__ = ("hash", "id", "next", "parent_hash", "prev", "ref_count", "token_bytes")

    def __init__(self, block_id: int) -> None:
        self.id = block_id
        self.ref_count = 0
        self.hash: bytes | None = None
        """sha256 chain value, set while published."""
        self.parent_hash: bytes | None = None
        self.token_bytes: bytes | None = None
        """The block's own token ids as raw int32, compared on a hit."""
        # Neighbours in the free list, None while the block is not in it.
        self.prev: Block | None = None
        self.next: Block | None = None

    def __repr__(self) -> str:
        digest = self.hash.hex()[:8] if self.hash is not None else None
        return f"Block({self.id}, ref_count={self.ref_count}, hash={digest})"


class FreeBlockList:
    """Doubly linked list of free blocks in order of reuse: every operation is O(1).

    Blocks without a hash are worthless and wait at the front; published ones queue behind them, least recently used
    first, so the cache loses its oldest entries last of all.
    """

    def __init__(self) -> None:
        self._head = Block(-1)
        self._tail = Block(-2)
        self._head.next = self._tail
        self._tail.prev = self._head
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Block]:
        block = self._head.next
        while block is not None and block is not self._tail:
            yield block
            block = block.next

    def push_front(self, block: Block) -> None:
        """To be reused next."""
        after = self._head.next
        assert after is not None
        self._link(self._head, block, after)

    def push_back(self, block: Block) -> None:
        """To be reused last."""
        before = self._tail.prev
        assert before is not None
        self._link(before, block, self._tail)

    def pop_front(self) -> Block:
        """Raises IndexError if no block is free."""
        block = self._head.next
        if block is None or block is self._tail:
            raise IndexError("no free block")
        self.remove(block)
        return block

    def remove(self, block: Block) -> None:
        """Take out a block from anywhere in the list."""
        before, after = block.prev, block.next
        if before is None or after is None:
            raise ValueError(f"{block!r} is not in the free list")
        before.next, after.prev = after, before
        block.prev = block.next = None
        self._length -= 1

    def _link(self, before: Block, block: Block, after: Block) -> None:
        if block.prev is not None or block.next is not None:
            raise ValueError(f"{block!r} is in the free list already")
        block.prev, block.next = before, after
        before.next = after.prev = block
        self._length += 1
