"""Files of weights as mapped memory, which is read only where it is touched."""

from __future__ import annotations

import mmap
from pathlib import Path

from ..spec import ModelError


def map_file(path: Path, missing_advice: str) -> mmap.mmap:
    """The whole file, read-only. Raises ModelError for one that is missing (with the advice), empty or unreadable."""
    if not path.is_file():
        raise ModelError(f"no such file: {path}; {missing_advice}")
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise ModelError(f"{path.name}: the file is empty; download it again") from None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; check that the file may be read") from error
