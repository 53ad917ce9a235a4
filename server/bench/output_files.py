"""Files that results are written to."""

from __future__ import annotations

import os
from pathlib import Path

from ..options import OptionError


def parse_output_file(text: str | None, flag: str) -> Path | None:
    """A file that can be written, checked before anything is measured; it is not made yet. Raises OptionError."""
    if text is None:
        return None
    path = Path(text)
    if path.is_dir():
        raise OptionError(f"{flag}: {text} is a directory; name a file")
    if not path.parent.is_dir():
        raise OptionError(f"{flag}: there is no directory {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OptionError(f"{flag}: {text} cannot be written; choose another file")
    return path


def write_output_file(path: Path, text: str) -> None:
    """Raises OptionError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OptionError(f"cannot write {path}: {error.strerror}") from None
