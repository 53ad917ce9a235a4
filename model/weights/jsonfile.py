"""Small JSON files that a model brings along, read without trust. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..spec import ModelError

MAX_JSON_BYTES = 1 << 26


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file whose top is an object. Raises ModelError where it is not, or cannot be read."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ModelError(f"{path.name} has {size} bytes, too many for what it should hold; download it again")
        return parse_json_object(path.read_bytes(), path.name)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}; download the whole model again") from error


def read_optional_json_object(path: Path) -> dict[str, Any]:
    """The same, and {} where the file does not exist."""
    return read_json_object(path) if path.is_file() else {}


def parse_json_object(data: bytes, what: str) -> dict[str, Any]:
    """Raises ModelError, naming `what`, where `data` is not one JSON object with distinct keys."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_distinct)
    # RecursionError: nesting deeper than the parser's stack; ValueError: bad UTF-8, bad JSON, absurdly long integers.
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{what} is not valid JSON ({str(error)[:100]}); download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{what} should be a JSON object; download it again")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key appears twice")
    return values
