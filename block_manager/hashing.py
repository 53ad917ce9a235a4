"""Identity of a prefix: a chain of sha256 over the raw token ids of its full blocks."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import sha256


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as raw int32 in the machine's byte order."""
    return array("i", token_ids).tobytes()


def root_hash(salt: str) -> bytes:
    """The parent of a sequence's first block. Different salts share no block."""
    return sha256(b"octavo:" + salt.encode("utf-8", "surrogatepass")).digest()


def chain_hash(parent: bytes, tokens: bytes) -> bytes:
    """The hash of a block, which stands for everything up to and including it."""
    return sha256(parent + tokens).digest()


class BlockHashes:
    """The hash chain of one sequence, extended once per filled block and never computed twice."""

    __slots__ = ("_block_size", "hashes", "root", "tokens")

    def __init__(self, block_size: int, salt: str = "") -> None:
        self._block_size = block_size
        self.root = root_hash(salt)
        self.hashes: list[bytes] = []
        self.tokens: list[bytes] = []
        """Raw token ids of each hashed block."""

    def extend(self, token_ids: Sequence[int], num_tokens: int) -> int:
        """Cover the full blocks of `token_ids[:num_tokens]`; returns how many there are."""
        num_full = num_tokens // self._block_size
        for index in range(len(self.hashes), num_full):
            tokens = token_bytes(token_ids[index * self._block_size : (index + 1) * self._block_size])
            self.hashes.append(chain_hash(self.parent(index), tokens))
            self.tokens.append(tokens)
        return num_full

    def parent(self, index: int) -> bytes:
        return self.hashes[index - 1] if index > 0 else self.root

    def take_over(self, other: BlockHashes, num_tokens: int) -> None:
        """Start from what another sequence with the same salt and the same first `num_tokens` has hashed already."""
        num_full = num_tokens // self._block_size
        self.hashes, self.tokens = other.hashes[:num_full], other.tokens[:num_full]
