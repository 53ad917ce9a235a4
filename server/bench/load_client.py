"""Sends one request, and records what came back when, or how it failed."""

from __future__ import annotations

import asyncio
import errno
import json
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

from ...model.text import one_line
from ..client_events import EndlessEvent, Usage, usage_of
from .load_settings import Settings
from .load_stream import StreamReader, error_text
from .load_workload import PlannedRequest

MAX_ERROR_BYTES = 64 * 1024
KEEP_ALIVE_S = 2.0
"""Shorter than any server's, so that a request is never written into a connection that the server is closing."""


class RequestFailed(Exception):
    """`kind` is what errors are counted by; the message is one line."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a server can be asked for beyond the bare minimum; found out by trying."""

    include_usage: bool = True
    continuous_usage: bool = True
    """Every chunk carries the number of tokens so far."""
    ignore_eos: bool = True
    max_completion_tokens: bool = False
    """The limit goes by this name, instead of max_tokens."""


@dataclass(slots=True)
class Record:
    """One request's outcome; times in seconds on the clock of `time.perf_counter`."""

    planned_input: int | None
    max_tokens: int
    intended_s: float
    """When it was due; latencies count from here."""
    sent_s: float
    end_s: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """(time, items) of every read that brought tokens; see StreamReader."""
    usage: Usage = field(default_factory=Usage)
    num_chunks: int = 0
    """Chunks with text; 0 without streaming."""
    num_counts: int = 0
    """Chunks that said how many tokens there were so far."""
    error_kind: str | None = None
    error_message: str = ""

    @property
    def ok(self) -> bool:
        return self.error_kind is None

    @property
    def output_tokens(self) -> int:
        """By the server's count, or of chunks if it gives none."""
        return self.num_chunks if self.usage.output_tokens is None else self.usage.output_tokens


@dataclass(slots=True)
class LoadClient:
    """One server, as it has to be talked to."""

    session: aiohttp.ClientSession
    root: str
    model: str
    endpoint: str
    stream: bool
    temperature: float
    timeout_s: float
    dialect: Dialect = Dialect()
    api_key: str | None = field(default=None, repr=False)
    now: Callable[[], float] = time.perf_counter

    @property
    def url(self) -> str:
        return self.root + ("/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions")

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def body(self, request: PlannedRequest) -> bytes:
        """The request as JSON, made before its time comes."""
        limit = "max_completion_tokens" if self.dialect.max_completion_tokens else "max_tokens"
        body: dict[str, Any] = {
            "model": self.model,
            "messages" if self.endpoint == "chat" else "prompt": request.prompt,
            limit: request.max_tokens,
            "temperature": self.temperature,
        }
        if self.dialect.ignore_eos:
            body["ignore_eos"] = True
        if self.stream:
            body["stream"] = True
            if self.dialect.include_usage:
                body["stream_options"] = {"include_usage": True}
                if self.dialect.continuous_usage:
                    body["stream_options"]["continuous_usage_stats"] = True
        return json.dumps(body).encode()

    async def send(self, request: PlannedRequest, body: bytes, intended_s: float | None = None) -> Record:
        """Returns when the answer has ended, in whatever way; raises nothing but CancelledError."""
        sent_s = self.now()
        record = Record(request.input_tokens, request.max_tokens, sent_s if intended_s is None else intended_s, sent_s)
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._exchange(body, record)
        except (RequestFailed, TimeoutError, aiohttp.ClientError, OSError) as error:
            failure = _as_failure(error, self.timeout_s)
            record.error_kind, record.error_message = failure.kind, self._without_key(str(failure))
            record.end_s = self.now()
        return record

    async def _exchange(self, body: bytes, record: Record) -> None:
        headers = self.headers | {"Content-Type": "application/json"}
        async with self.session.post(self.url, data=body, headers=headers, allow_redirects=False) as response:
            if response.status != 200:
                text = error_text(await _read_at_most(response, MAX_ERROR_BYTES))
                raise RequestFailed(f"HTTP {response.status}", text)
            if self.stream:
                await self._read_stream(response, record)
            else:
                await self._read_whole(response, record)

    async def _read_stream(self, response: aiohttp.ClientResponse, record: Record) -> None:
        reader = StreamReader(counts_tokens=self.dialect.include_usage and self.dialect.continuous_usage)
        record.arrivals = reader.arrivals
        try:
            async for received in response.content.iter_any():
                reader.feed(received, self.now())
        except EndlessEvent as error:
            raise RequestFailed("malformed stream", str(error)) from None
        finally:  # what had arrived counts even if the rest did not
            record.usage, record.num_chunks, record.num_counts = reader.usage(), reader.num_chunks, reader.num_counts
        if reader.error is not None:
            raise RequestFailed("error event", reader.error)
        if reader.malformed is not None:
            raise RequestFailed("malformed stream", reader.malformed)
        if reader.done_s is None and not reader.finished:
            raise RequestFailed("stream cut short", "the stream ended without a finish_reason or [DONE]")
        if record.output_tokens == 0:
            raise RequestFailed("empty answer", "the stream ended well but held no token")
        record.end_s = self.now() if reader.done_s is None else reader.done_s

    async def _read_whole(self, response: aiohttp.ClientResponse, record: Record) -> None:
        data = await response.read()
        record.end_s = self.now()
        try:
            record.usage = usage_of(json.loads(data))
        except (ValueError, RecursionError):
            raise RequestFailed("malformed answer", "the answer is not JSON") from None
        if not record.usage.output_tokens:
            raise RequestFailed("empty answer", "the answer's usage counts no token")

    def _without_key(self, message: str) -> str:
        """Servers have been seen to repeat a wrong key."""
        return message.replace(self.api_key, "***") if self.api_key else message

    def with_dialect(self, dialect: Dialect) -> LoadClient:
        return replace(self, dialect=dialect)


def open_session() -> aiohttp.ClientSession:
    """Any number of connections at once, kept between requests; proxies and time limits are the caller's."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None),
        headers={"Accept-Encoding": "identity", "User-Agent": "octavo-bench"},
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def client_for(
    settings: Settings, session: aiohttp.ClientSession, root: str, api_key: str | None, model: str
) -> LoadClient:
    dialect = Dialect(ignore_eos=settings.ignore_eos)
    return LoadClient(
        session, root, model, settings.endpoint, settings.stream, settings.temperature, settings.timeout_s, dialect,
        api_key,
    )  # fmt: skip


async def _read_at_most(response: aiohttp.ClientResponse, num_bytes: int) -> bytes:
    data = b""
    async for received in response.content.iter_any():
        data += received
        if len(data) >= num_bytes:
            break
    return data


def _as_failure(error: Exception, timeout_s: float) -> RequestFailed:
    """By what a reader of the report wants to tell apart. The order matters: aiohttp's errors overlap."""
    text = one_line(str(error), 200) or type(error).__name__
    if isinstance(error, RequestFailed):
        return error
    if isinstance(error, TimeoutError):
        return RequestFailed("timeout", f"no complete answer within {timeout_s:g} s")
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, aiohttp.ClientConnectorError) or number == errno.ECONNREFUSED:
        if number == errno.ECONNREFUSED:
            return RequestFailed("connection refused", text)
        is_tls = isinstance(error, ssl.SSLError | aiohttp.ClientSSLError)
        return RequestFailed("TLS failed" if is_tls else "connection failed", text)
    broken = (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError, ConnectionError)
    if isinstance(error, broken):
        return RequestFailed("connection reset", text)
    return RequestFailed("malformed answer", text)
