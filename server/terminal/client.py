"""A small client of the OpenAI API: the list of models, and answers as they are generated."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp

from ...model.text import one_line
from ..client_events import EndlessEvent, EventSplitter, error_message, read_json, usage_of
from .conversation import Usage

_CONNECT_TIMEOUT_S = 10.0
_LIST_TIMEOUT_S = 30.0
_MAX_ERROR_BYTES = 1 << 16


class ServerError(Exception):
    """The server refused, failed or is not there. The message is one line, fit for the user."""

    def __init__(self, message: str, *, context_exceeded: bool = False) -> None:
        super().__init__(message)
        self.context_exceeded = context_exceeded
        """The conversation has outgrown the model."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of an answer."""

    text: str = ""
    reasoning: str = ""
    """What the model thinks before it answers, from servers that tell it apart."""
    finish_reason: str | None = None
    usage: Usage | None = None


def parse_piece(event: bytes) -> Piece:
    """One event of a streamed chat completion. Raises ServerError for an error event, or what is no event."""
    try:
        chunk = json.loads(event)
    except (ValueError, RecursionError):
        raise ServerError(
            f"the server sent an event that is not JSON: {one_line(event[:1000].decode('utf-8', 'replace'), 80)}"
        ) from None
    if not isinstance(chunk, dict):
        raise ServerError("the server sent an event that is not an object")
    message = error_message(chunk)
    if message is not None:
        raise ServerError(message or "the server reports an error", context_exceeded=_is_context(chunk))
    choices = chunk.get("choices")
    choice = _object(choices[0]) if isinstance(choices, list) and choices else {}
    delta = _object(choice.get("delta"))
    finish_reason = choice.get("finish_reason")
    return Piece(
        text=_text(delta.get("content")),
        reasoning=_text(delta.get("reasoning_content") or delta.get("reasoning")),
        finish_reason=one_line(finish_reason) if isinstance(finish_reason, str) else None,
        usage=_usage(chunk),
    )


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _usage(chunk: dict[str, Any]) -> Usage | None:
    """None where one of the two counts is missing."""
    counted = usage_of(chunk)
    if counted.prompt_tokens is None or counted.output_tokens is None:
        return None
    return Usage(counted.prompt_tokens, counted.output_tokens, counted.cached_tokens)


def _is_context(body: Any) -> bool:
    error = body.get("error") if isinstance(body, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    message = (error_message(body) or "").lower()
    return code == "context_length_exceeded" or "context length" in message or "context window" in message


class ChatClient:
    """One server. Every method raises ServerError. Make and use it on one event loop."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        """`base_url` up to and with its version, such as http://127.0.0.1:8000/v1."""
        self._base_url = base_url
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        # No limit on the whole: an answer may take minutes, and the user can stop it at any time.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S)
        self._http = aiohttp.ClientSession(headers=headers, timeout=timeout)

    async def close(self) -> None:
        await self._http.close()

    async def models(self) -> list[str]:
        """The names that the server offers, its default first."""
        try:
            async with asyncio.timeout(_LIST_TIMEOUT_S), self._http.get(f"{self._base_url}/models") as response:
                await self._require_ok(response)
                body = await response.json(content_type=None)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._unreachable(error) from error
        except ValueError:
            raise self._foreign() from None
        listed = body.get("data") if isinstance(body, dict) else None
        ids = [item.get("id") for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
        names = [name for name in ids if isinstance(name, str)]
        if not names:
            raise ServerError(f"{self._base_url} offers no model; name one with --model")
        return names

    async def answer(self, body: dict[str, Any]) -> AsyncGenerator[Piece, None]:
        """Stream a chat completion. Closing the iterator closes the connection, which tells the server to stop."""
        request = body | {"stream": True, "stream_options": {"include_usage": True}}
        try:
            async with self._http.post(f"{self._base_url}/chat/completions", json=request) as response:
                try:
                    await self._require_ok(response)
                    if response.content_type != "text/event-stream":
                        raise self._foreign()
                    async for piece in _pieces(response):
                        yield piece
                finally:
                    response.close()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._unreachable(error) from error

    async def _require_ok(self, response: aiohttp.ClientResponse) -> None:
        if response.status < 300:
            return
        received = b""
        async for part in response.content.iter_any():
            received += part
            if len(received) > _MAX_ERROR_BYTES:
                break
        body = read_json(received)
        message = error_message(body) or f"{response.status} {one_line(response.reason or '')}".rstrip()
        if response.status == 401:
            message += " (give the key with --api-key or OCTAVO_API_KEY)"
        raise ServerError(message, context_exceeded=_is_context(body))

    def _unreachable(self, error: Exception) -> ServerError:
        if isinstance(error, aiohttp.ClientConnectorError | ConnectionRefusedError):
            return ServerError(
                f"no server answers at {self._base_url}; start one with `octavo serve`, or name another with --base-url"
            )
        if isinstance(error, TimeoutError):
            return ServerError(f"the server at {self._base_url} does not answer; check whether it is overloaded")
        return ServerError(f"the connection to {self._base_url} broke: {one_line(str(error)) or type(error).__name__}")

    def _foreign(self) -> ServerError:
        return ServerError(f"{self._base_url} does not answer as the OpenAI API does; check --base-url")


async def _pieces(response: aiohttp.ClientResponse) -> AsyncIterator[Piece]:
    splitter = EventSplitter()
    finished = False
    async for received in response.content.iter_any():
        try:
            events = splitter.feed(received)
        except EndlessEvent as error:
            raise ServerError(str(error)) from None
        for event in events:
            if event == b"[DONE]":
                return
            piece = parse_piece(event)
            finished = finished or piece.finish_reason is not None
            yield piece
    if not finished:
        raise ServerError("the server ended the answer before it was finished")
