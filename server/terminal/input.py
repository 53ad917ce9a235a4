"""Reading what the user types: lines that continue, blocks, and the history of earlier sessions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

try:
    import readline
except ImportError:  # a Python built without it: no editing and no history, but a chat all the same
    readline = None  # type: ignore[assignment]

from ...model.text import without_surrogates
from .commands import NAMES, SETTINGS

QUOTES = '"""'
_MAX_HISTORY_LINES = 2000


@dataclass(frozen=True, slots=True)
class Entry:
    """One finished input."""

    text: str
    is_block: bool = False
    """Written between triple quotes: never a command."""


class LineAssembler:
    """Lines → entries. A line that ends in a backslash continues on the next; triple quotes open and end a block."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._in_block = False

    @property
    def is_open(self) -> bool:
        """Whether more lines belong to what was fed."""
        return self._in_block or bool(self._lines)

    def feed(self, line: str) -> Entry | None:
        """Add a line, without its newline; the entry if that finishes it."""
        if not self.is_open and line.lstrip().startswith(QUOTES):
            self._in_block = True
            line = line.lstrip()[len(QUOTES) :]
        if self._in_block:
            if line.rstrip().endswith(QUOTES):
                return self._finish(line.rstrip()[: -len(QUOTES)])
        elif not line.endswith("\\"):
            return self._finish(line)
        else:
            line = line[:-1]
        self._lines.append(line)
        return None

    def finish(self) -> Entry | None:
        """What was fed so far, at the end of the input."""
        return self._finish(None) if self.is_open else None

    def _finish(self, last_line: str | None) -> Entry:
        lines = self._lines if last_line is None else [*self._lines, last_line]
        text = "\n".join(lines)
        entry = Entry(text.strip("\n") if self._in_block else text, self._in_block)
        self._lines, self._in_block = [], False
        return entry


def read_entry(prompt: str, continuation: str) -> Entry:
    """The next entry from the keyboard. Raises EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C."""
    assembler = LineAssembler()
    while True:
        try:
            line = input(continuation if assembler.is_open else prompt)
        except EOFError:
            entry = assembler.finish()
            if entry is None:
                raise
            return entry
        # A paste of several lines arrives as one, with newlines in it, and is one entry.
        entry = assembler.feed(without_surrogates(line))
        if entry is not None:
            return entry


def history_path(environ: Mapping[str, str]) -> Path:
    """Where the XDG base directory specification wants state to be kept."""
    base = environ.get("XDG_STATE_HOME", "")
    # The specification: a relative path there is invalid, and to be ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state"
    return root / "octavo" / "chat_history"


class History:
    """The lines of earlier sessions, in a file that only its owner may read."""

    def __init__(self, path: Path) -> None:
        """Loads what there is. Raises OSError where the file cannot be read or made."""
        self._path = path
        if readline is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        path.chmod(0o600)
        readline.set_history_length(_MAX_HISTORY_LINES)
        readline.read_history_file(path)
        if readline.get_current_history_length() > _MAX_HISTORY_LINES:
            readline.write_history_file(path)  # cuts it to the length set above
        self._num_saved = readline.get_current_history_length()

    def save(self) -> None:
        """Append what was typed since the last call, so that two chats at once keep both their lines."""
        if readline is None:
            return
        num_lines = readline.get_current_history_length()
        if num_lines > self._num_saved:
            if hasattr(readline, "append_history_file"):
                readline.append_history_file(num_lines - self._num_saved, self._path)
            else:  # libedit
                readline.write_history_file(self._path)
            self._num_saved = num_lines


def enable_completion() -> None:
    """Tab completes commands and the names of settings."""
    if readline is None:
        return

    def complete(text: str, state: int) -> str | None:
        line = readline.get_line_buffer()
        names = [f"/{name}" for name in NAMES] if line == text else list(SETTINGS) if line.startswith("/set ") else []
        matching = [f"{name} " for name in names if name.startswith(text) and line.startswith("/")]
        return matching[state] if state < len(matching) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")
