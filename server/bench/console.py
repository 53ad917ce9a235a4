"""The terminal that measurements print to."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH_OF_FILES = 120


def report_console() -> Console:
    """A rich console on stdout: as wide as the terminal, and wide enough for any table in a pipe or a file."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _WIDTH_OF_FILES
    return console
