"""The block manager's slice of the configuration, and the size of its pools (which whoever owns the memory decides)."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_SIZES = (16, 32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    block_size: int = 32
    """Tokens a block holds."""
    kv_cache_memory: int | None = None
    """Bytes of K/V pool. None: from the memory that is free once the weights are loaded."""
    enable_prefix_caching: bool = True


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """The blocks of one layer group."""

    num_blocks: int
    """Block 0, which no sequence owns, included."""
    window: int | None = None
    """The newest tokens that a query of these layers sees, itself among them. None: all there are."""
