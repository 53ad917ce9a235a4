"""A scripted server with the OpenAI API, in a thread, and a terminal to talk to it from."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

DEADLINE_S = 60.0
COMMAND = str(Path(sys.executable).with_name("octavo"))

Reply = Callable[[web.Request, web.StreamResponse], Awaitable[None]]
"""Writes the events of an answer."""


async def send(stream: web.StreamResponse, **fields: Any) -> None:
    await stream.write(b"data: " + json.dumps(fields).encode() + b"\n\n")


async def send_text(stream: web.StreamResponse, text: str) -> None:
    await send(stream, choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}], usage=None)


def says(*pieces: str, finish: str = "stop", cached: int = 3) -> Reply:
    """A whole answer, with usage."""

    async def reply(_: web.Request, stream: web.StreamResponse) -> None:
        await send(stream, choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
        for piece in pieces:
            await send_text(stream, piece)
        await send(stream, choices=[{"index": 0, "delta": {}, "finish_reason": finish}])
        usage = {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": cached}}
        await send(stream, choices=[], usage=usage)
        await stream.write(b"data: [DONE]\n\n")

    return reply


def refuses(status: int, message: str, code: str | None = None) -> Reply:
    """Not a stream at all, but an error of that status."""

    async def reply(_: web.Request, __: web.StreamResponse) -> None:
        body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
        raise _Refusal(status, json.dumps(body).encode())

    return reply


def breaks_after(text: str, message: str | None = None) -> Reply:
    """Some text, then an error event; without a message, then nothing."""

    async def reply(_: web.Request, stream: web.StreamResponse) -> None:
        await send_text(stream, text)
        if message is not None:
            await send(stream, error={"message": message, "type": "server_error"})

    return reply


def never_ends(text: str) -> Reply:
    """Some text, then an event that goes on until the client leaves."""

    async def reply(_: web.Request, stream: web.StreamResponse) -> None:
        await send_text(stream, text)
        await stream.write(b"data: ")
        while True:
            await stream.write(b"x" * 2**16)

    return reply


class _Refusal(Exception):
    def __init__(self, status: int, body: bytes) -> None:
        self.status, self.body = status, body


class FakeChatServer:
    """Replies by a script, one after the other; the last one goes on."""

    def __init__(self) -> None:
        self.replies: list[Reply] = [says("Hello")]
        self.models: list[str | None] = ["tiny", "other"]
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.left = threading.Event()
        """A client has closed its connection before its answer was finished."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def hangs_after(self, text: str) -> Reply:
        """Some text, and then silence until the client leaves."""

        async def reply(_: web.Request, stream: web.StreamResponse) -> None:
            if text:
                await send_text(stream, text)
            try:
                await asyncio.Event().wait()
            finally:  # cancelled, as the client has left
                self.left.set()

        return reply

    def __enter__(self) -> FakeChatServer:
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(DEADLINE_S)
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)
        self._loop.close()

    def stop(self) -> None:
        """Stop listening, as a server that has crashed."""
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(DEADLINE_S)

    async def _start(self) -> int:
        app = web.Application()
        app.router.add_get("/v1/models", self._list)
        app.router.add_post("/v1/chat/completions", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        port: int = self._runner.addresses[0][1]
        return port

    async def _list(self, request: web.Request) -> web.Response:
        self.keys.append(request.headers.get("Authorization"))
        return web.json_response({"data": [{"id": name} for name in self.models]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.keys.append(request.headers.get("Authorization"))
        self.requests.append(await request.json())
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        try:
            if not reply.__qualname__.startswith("refuses"):
                await stream.prepare(request)
            await reply(request, stream)
        except _Refusal as refusal:
            return web.Response(status=refusal.status, body=refusal.body, content_type="application/json")
        return stream


class Terminal:
    """A program at a terminal of its own."""

    def __init__(self, *arguments: str, env: dict[str, str]) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execve(COMMAND, [COMMAND, *arguments], env)
        self._unread = ""
        self.output = ""

    def expect(self, pattern: str) -> str:
        """Read on until the pattern appears; returns what came up to its end."""
        while (match := re.search(pattern, self._unread)) is None:
            assert self._read(), f"{pattern!r} never came; got {self.output!r}"
        seen, self._unread = self._unread[: match.end()], self._unread[match.end() :]
        return seen

    def _read(self) -> bool:
        """Some more output; False once the program has ended."""
        ready, _, _ = select.select([self._fd], [], [], DEADLINE_S)
        assert ready, f"nothing more came after {self.output!r}"
        try:
            received = os.read(self._fd, 65536)
        except OSError:  # how Linux reports that the other side has ended
            received = b""
        text = received.decode("utf-8", "replace")
        self._unread += text
        self.output += text
        return bool(received)

    def send(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait(self) -> int:
        """The exit status, once all output is read."""
        while self._read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        os.close(self._fd)
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # it has ended, and was waited for
