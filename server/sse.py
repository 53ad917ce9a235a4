"""Server-sent events: a response that ends with its client, and chunks rendered without a JSON library's help."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

DONE = b"data: [DONE]\n\n"
WRITE_TIMEOUT_S = 60.0
"""A client that takes nothing for this long is gone; its request must not hold KV blocks any longer."""
GOODBYE_TIMEOUT_S = 1.0

T = TypeVar("T")


def json_string(text: str) -> str:
    """A JSON string literal, in ASCII: some readers of event streams split lines at U+2028 or U+0085 too."""
    return json.dumps(text)


def event(payload: bytes) -> bytes:
    """One event; without the blank line at its end a client never sees it."""
    return b"data: " + payload + b"\n\n"


class EventStream(Response):
    """Sends what `events` yields, one write for each, until it ends or the client leaves.

    `on_close` is called exactly once, whatever happens, even if the first event was never asked for.
    `last_words` are sent when it is the server that has to leave, so that the client need not guess.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        on_close: Callable[[], None],
        last_words: bytes = b"",
        headers: dict[str, str] | None = None,
        write_timeout_s: float = WRITE_TIMEOUT_S,
        background: BackgroundTask | None = None,
    ) -> None:
        # X-Accel-Buffering: a proxy that collects events before passing them on defeats their purpose.
        self.status_code = 200
        self.background = background
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"} | (headers or {}))
        self._events = events
        self._on_close = on_close
        self._last_words = last_words
        self._started = False
        self._writing_since: float | None = None
        self._write_timeout_s = write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.create_task(self._pump(send))
        leaving = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            while not (pump.done() or leaving.done() or self._is_stuck()):
                await asyncio.wait({pump, leaving}, timeout=self._write_timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not pump.done():
                raise ClientDisconnect
            pump.result()
        except asyncio.CancelledError:
            await _cancel(pump, leaving)
            await self._say_goodbye(send)
            raise
        finally:
            self._on_close()
            await _cancel(pump, leaving)
            await self._events.aclose()

    async def _say_goodbye(self, send: Send) -> None:
        if not self._started:
            return
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(GOODBYE_TIMEOUT_S):
                await send({"type": "http.response.body", "body": self._last_words, "more_body": False})

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._started = True
        try:
            async for data in self._events:
                self._writing_since = time.monotonic()
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self._writing_since = None
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError as error:
            raise ClientDisconnect from error

    def _is_stuck(self) -> bool:
        """Looked at once in a while: a timer for every token would cost more than the write itself."""
        since = self._writing_since
        return since is not None and time.monotonic() - since >= self._write_timeout_s


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, but cancel it as soon as the client leaves; raises ClientDisconnect then."""
    task = asyncio.create_task(work)
    leaving = asyncio.create_task(_wait_for_disconnect(request.receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        await _cancel(task, leaving)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
