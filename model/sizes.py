"""How sizes are written for people. Torch-free: the HTTP process says them too."""

from __future__ import annotations


def size_text(num_bytes: int) -> str:
    """GiB with two decimals, or whole MiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
