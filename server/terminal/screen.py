"""What the chat writes, and how it looks."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from ...model.text import printable


def wants_color(environ: Mapping[str, str] | None = None) -> bool:
    environ = os.environ if environ is None else environ
    return sys.stdout.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


class Screen:
    """Standard output, where answers and notes do not run into each other's lines."""

    def __init__(self, *, color: bool) -> None:
        self._color = color
        self._at_line_start = True

    @property
    def prompt(self) -> str:
        return self._prompt("> ")

    @property
    def continuation(self) -> str:
        return self._prompt(". ")

    def _prompt(self, text: str) -> str:
        # \001 and \002 tell readline what takes no room on the line.
        return f"\001\033[1;32m\002{text}\001\033[0m\002" if self._color else text

    def answer(self, text: str) -> None:
        """Some of an answer, as it arrives."""
        self._write(printable(text))

    def thinking(self, text: str) -> None:
        self._write(self._dim(printable(text)) if text else "", ends_line=text.endswith("\n"))

    def note(self, text: str) -> None:
        """A line of the chat's own."""
        self.end_line()
        self._write(self._dim(printable(text)) + "\n")

    def error(self, text: str) -> None:
        """A line about what went wrong."""
        self.end_line()
        line = printable(text)
        self._write((f"\033[31m! {line}\033[0m" if self._color else f"! {line}") + "\n")

    def end_line(self) -> None:
        if not self._at_line_start:
            self._write("\n")

    def _dim(self, text: str) -> str:
        return f"\033[2m{text}\033[0m" if self._color else text

    def _write(self, text: str, *, ends_line: bool = False) -> None:
        if text:
            print(text, end="", flush=True)
            self._at_line_start = ends_line or text.endswith("\n")
