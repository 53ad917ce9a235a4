"""What the prefix cache has lost: only so that a miss can be told from a prompt that was never seen."""

from __future__ import annotations

from collections import OrderedDict


class EvictedHashes:
    """The hashes of the blocks evicted last, at most `capacity` of them; the oldest is forgotten first.

    Every operation is O(1). An OrderedDict and not a dict, because finding the first key of a dict whose front has
    been deleted passes over every gap again.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._hashes: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._hashes

    def add(self, block_hash: bytes) -> None:
        """Remember it as the newest."""
        self._hashes[block_hash] = None
        self._hashes.move_to_end(block_hash)
        if len(self._hashes) > self.capacity:
            self._hashes.popitem(last=False)

    def discard(self, block_hash: bytes) -> None:
        """It can be found again; unknown ones are ignored."""
        self._hashes.pop(block_hash, None)
