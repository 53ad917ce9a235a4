"""Reads the event stream of one answer, and notes when its tokens arrived.

Runs for every read of every open connection, so an event is not parsed as JSON: what is needed of it is found by
searching its bytes. That is safe, since a quote inside a JSON string is always escaped, so `"text"` with both its
quotes bare can only be a key or a whole string value.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

_COUNT = re.compile(rb'"completion_tokens"\s*:\s*(\d+)')
_TEXT = re.compile(rb'"(?:text|content|reasoning_content|reasoning)"\s*:\s*"[^"]')
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"')


@dataclass(frozen=True, slots=True)
class Usage:
    """A server's own count; None where it says nothing."""

    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None


class EventSplitter:
    """Bytes as they come in → the data of complete events. Comments and other fields are dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
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
        return events


@dataclass(slots=True)
class StreamReader:
    """One answer under way.

    What one read brought counts as one arrival, however many events it held. `arrivals` holds (time in seconds on the
    caller's clock, items): items are tokens if `counts_tokens`, that is, if every chunk carries the number of tokens so
    far, else chunks with text in them.
    """

    counts_tokens: bool
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    num_items: int = 0
    num_chunks: int = 0
    """Chunks with text."""
    num_counts: int = 0
    """Chunks that say how many tokens there are so far."""
    done_s: float | None = None
    """When [DONE] came."""
    finished: bool = False
    """Whether a finish_reason came."""
    error: str | None = None
    """The message of an error event."""
    malformed: str | None = None
    _last_count: bytes = b""
    _splitter: EventSplitter = field(default_factory=EventSplitter)

    def feed(self, received: bytes, now_s: float) -> None:
        before = self.num_items
        for event in self._splitter.feed(received):
            if event == b"[DONE]":
                self.done_s = now_s
            elif event[:1] != b"{" or event[-1:] != b"}":
                self.malformed = self.malformed or f"an event is no JSON object: {shorten(event)}"
            else:
                self._chunk(event)
        if self.num_items > before:
            self.arrivals.append((now_s, self.num_items - before))

    def _chunk(self, event: bytes) -> None:
        if b'"error"' in event and (message := _error_message(event)) is not None:
            self.error = self.error or message
            return
        has_text = _TEXT.search(event) is not None
        self.num_chunks += has_text
        if not self.finished and _FINISH.search(event) is not None:
            self.finished = True
        if (count := _COUNT.search(event)) is not None:
            self._last_count = event
            self.num_counts += 1
            if self.counts_tokens:
                self.num_items = max(self.num_items, int(count[1]))
        if not self.counts_tokens:
            self.num_items += has_text

    def usage(self) -> Usage:
        """What the newest chunk with a count says."""
        try:
            return usage_of(json.loads(self._last_count)) if self._last_count else Usage()
        except ValueError:
            return Usage()


def usage_of(answer: Any) -> Usage:
    """The `usage` of a chunk or a complete answer, whatever is missing from it."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return Usage()
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Usage(_whole(usage.get("prompt_tokens")), _whole(usage.get("completion_tokens")), _whole(cached))


def error_text(body: bytes) -> str:
    """The message of an error response in any of the usual shapes, else its beginning."""
    return _error_message(body) or shorten(body)


def shorten(data: bytes) -> str:
    text = " ".join(data[:1000].decode("utf-8", "replace").split())
    return text if len(text) <= 200 else text[:199] + "…"


def _error_message(data: bytes) -> str | None:
    """None: this is no error."""
    try:
        parsed = json.loads(data)
    except ValueError:
        return None
    if not isinstance(parsed, dict):
        return None
    error = parsed.get("error")
    if error is None:  # the whole object is the error, in older versions of vLLM and of llama.cpp
        if parsed.get("object") != "error" and not {"code", "message", "type"} <= parsed.keys():
            return None
        error = parsed
    message = error.get("message") if isinstance(error, dict) else error
    return shorten(str(message or error).encode())


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
