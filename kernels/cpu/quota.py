"""How many threads are of use where a control group limits the CPU time, as `docker run --cpus` does."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_threads(num_threads: int, root: Path = Path("/sys/fs/cgroup")) -> int:
    """`num_threads`, or fewer: no more than the cores' worth of time that the container has, rounded up. More would
    spend it on waiting for one another. What a user asks for in OMP_NUM_THREADS stays as it is."""
    quota = None if os.environ.get("OMP_NUM_THREADS") else _quota(root)
    return num_threads if quota is None else max(1, min(num_threads, math.ceil(quota)))


def _quota(root: Path) -> float | None:
    """Cores' worth of time; None where nothing limits it. Version 2 of control groups first, then version 1."""
    fields = [_words(root / "cpu.max"), _words(root / "cpu/cpu.cfs_quota_us") + _words(root / "cpu/cpu.cfs_period_us")]
    for words in fields:
        try:
            quota, period = (int(word) for word in words)
        except ValueError:  # no such files, or "max", which says that there is no limit
            continue
        if quota > 0 and period > 0:  # version 1 says -1
            return quota / period
    return None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []
