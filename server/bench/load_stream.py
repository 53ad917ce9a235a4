"""Reads the event stream of one answer, and notes when its tokens arrived.

Runs for every read of every open connection, so an event is not parsed as JSON: what is needed of it is found by
searching its bytes. That is safe, since a quote inside a JSON string is always escaped, so `"text"` with both its
quotes bare can only be a key or a whole string value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ...model.text import one_line
from ..client_events import EventSplitter, Usage, error_message, read_json, usage_of

_MAX_MESSAGE_CHARS = 200
_COUNT = re.compile(rb'"completion_tokens"\s*:\s*(\d+)')
_TEXT = re.compile(rb'"(?:text|content|reasoning_content|reasoning)"\s*:\s*"[^"]')
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"')


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
        """Raises EndlessEvent."""
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
        if b'"error"' in event:
            message = error_message(read_json(event), _MAX_MESSAGE_CHARS)
            if message is not None:
                self.error = self.error or message or shorten(event)
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
        return usage_of(read_json(self._last_count))


def error_text(body: bytes) -> str:
    """The message of an error response in any of the usual shapes, else its beginning."""
    return error_message(read_json(body), _MAX_MESSAGE_CHARS) or shorten(body)


def shorten(data: bytes) -> str:
    return one_line(data[:1000].decode("utf-8", "replace"), _MAX_MESSAGE_CHARS)
