"""How sizes are written for people. Torch-free: the HTTP process says them too."""

from __future__ import annotations


def size_text(num_bytes: int) -> str:
    """GiB with two decimals, or whole MiB or KiB."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"
