"""The scheduler's slice of the configuration, and the cache's (which it hands to the block manager)."""

from __future__ import annotations

from dataclasses import dataclass

from ..block_manager.config import CacheConfig as CacheConfig
from ..block_manager.config import PoolConfig as PoolConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    max_num_seqs: int = 256
    """Sequences that may run at once."""
    max_num_batched_tokens: int | None = None
    """Token budget of one step. None: chosen by the device (a CPU takes smaller steps)."""
    max_num_waiting: int = 2048
    """Sequences that may wait; one more is refused with 429."""
