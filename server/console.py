"""The terminal that reports are printed to."""

from __future__ import annotations

from rich.console import Console

_WIDTH_OF_FILES = 120


class _ReportConsole(Console):
    def on_broken_pipe(self) -> None:
        """Not rich's way, which ends the process there and then with status 1: the command line knows what to do."""
        raise BrokenPipeError


def report_console(*, stderr: bool = False) -> Console:
    """As wide as the terminal, and wide enough for any table in a pipe or a file.

    Text is printed as it is: no markup, for names of models and words of servers may look like it.
    """
    console = _ReportConsole(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _WIDTH_OF_FILES
    return console
