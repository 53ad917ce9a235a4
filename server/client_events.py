"""What the API's clients read of an answer: server-sent events, token counts and errors, in every shape that servers
give them. `terminal/client.py` and `bench/load_stream.py` build on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..model.text import one_line

_MAX_EVENT_BYTES = 1 << 22


class EndlessEvent(Exception):
    """An event is longer than any answer's. The message is one line."""


class EventSplitter:
    """Bytes, cut anywhere → the data of complete events. Comments and other fields are dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """Raises EndlessEvent."""
        *lines, self._rest = (self._rest + received).split(b"\n")
        events: list[bytes] = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data = []
            elif line.startswith((b"data:", b"error:")):  # the latter is an older llama.cpp's
                self._data.append(line.partition(b":")[2].removeprefix(b" "))
        if len(self._rest) + sum(map(len, self._data)) > _MAX_EVENT_BYTES:
            raise EndlessEvent("the server sends an event that does not end")
        return events


@dataclass(frozen=True, slots=True)
class Usage:
    """A server's own count of tokens; None where it says nothing."""

    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    """Of the prompt."""


def usage_of(answer: Any) -> Usage:
    """The `usage` of a chunk or a complete answer, whatever is missing from it."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return Usage()
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Usage(_whole(usage.get("prompt_tokens")), _whole(usage.get("completion_tokens")), _whole(cached))


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def read_json(data: str | bytes) -> Any:
    """None for what is not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def error_message(body: Any, max_chars: int = 500) -> str | None:
    """The message of an event or a body that is an error, in one line; "" where it has none. None: this is no error."""
    if not isinstance(body, dict):
        return None
    error = body.get("error")
    # The whole object is the error, in older versions of vLLM and of llama.cpp.
    if not error and (body.get("object") == "error" or {"code", "message", "type"} <= body.keys()):
        error = body
    if not error and "choices" not in body:  # as FastAPI says it
        error = body.get("detail")
    if not error:
        return None
    message = error.get("message") if isinstance(error, dict) else error
    return one_line(message, max_chars) if isinstance(message, str) else ""
