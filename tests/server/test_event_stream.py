"""The stream response against a hand-made ASGI connection."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator

import pytest
from octavo.server.sse import EventStream
from starlette.requests import ClientDisconnect
from starlette.types import Message

pytestmark = pytest.mark.anyio
SCOPE = {"type": "http", "asgi": {"spec_version": "2.4"}}


class Connection:
    """Records what is sent; may block or break, and leaves when told to."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.left = asyncio.Event()
        self.begun = asyncio.Event()
        """The first event is out."""
        self.blocked = False
        self.broken = False

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self.blocked:
            await asyncio.Event().wait()
        if self.broken:
            raise OSError
        self.sent.append(message)
        if len(self.sent) == 2:
            self.begun.set()


class Source:
    """Events on demand; knows whether it was closed."""

    def __init__(self) -> None:
        self.closed = False
        self.num_close_calls = 0

    async def events(self, *data: bytes, then_wait: bool = False) -> AsyncGenerator[bytes, None]:
        try:
            for item in data:
                yield item
            if then_wait:
                await asyncio.Event().wait()
        finally:
            self.closed = True

    def on_close(self) -> None:
        self.num_close_calls += 1


async def test_it_sends_each_event_once_and_ends() -> None:
    connection, source = Connection(), Source()
    stream = EventStream(source.events(b"a", b"b"), on_close=source.on_close, headers={"X-A": "1"})
    await stream(SCOPE, connection.receive, connection.send)
    start, *bodies = connection.sent
    headers = dict(start["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"x-a"] == b"1"
    assert [(body["body"], body["more_body"]) for body in bodies] == [(b"a", True), (b"b", True), (b"", False)]
    assert (source.closed, source.num_close_calls) == (True, 1)


async def test_a_client_that_leaves_ends_it() -> None:
    connection, source = Connection(), Source()
    stream = EventStream(source.events(b"a", then_wait=True), on_close=source.on_close)
    running = asyncio.create_task(stream(SCOPE, connection.receive, connection.send))
    await connection.begun.wait()
    connection.left.set()
    with pytest.raises(ClientDisconnect):
        await running
    assert (source.closed, source.num_close_calls) == (True, 1)


async def test_a_broken_connection_ends_it() -> None:
    connection, source = Connection(), Source()
    connection.broken = True
    stream = EventStream(source.events(b"a"), on_close=source.on_close)
    with pytest.raises((ClientDisconnect, OSError)):
        await stream(SCOPE, connection.receive, connection.send)
    assert source.num_close_calls == 1


async def test_a_client_that_never_reads_ends_it() -> None:
    connection, source = Connection(), Source()

    async def send(message: Message) -> None:
        await connection.send(message)
        connection.blocked = True

    stream = EventStream(source.events(b"a"), on_close=source.on_close, write_timeout_s=0.01)
    with pytest.raises(ClientDisconnect):
        await stream(SCOPE, connection.receive, send)
    assert (source.closed, source.num_close_calls) == (True, 1)


async def test_a_server_that_leaves_says_last_words() -> None:
    connection, source = Connection(), Source()
    stream = EventStream(source.events(b"a", then_wait=True), on_close=source.on_close, last_words=b"bye")
    running = asyncio.create_task(stream(SCOPE, connection.receive, connection.send))
    await connection.begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert connection.sent[-1] == {"type": "http.response.body", "body": b"bye", "more_body": False}
    assert (source.closed, source.num_close_calls) == (True, 1)


def test_the_http_process_needs_no_torch() -> None:
    code = "import sys, octavo.server.app; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
