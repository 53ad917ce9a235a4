"""How bodies are read: JSON, strictly."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from ..errors import ApiError, invalid, printable, rejection_reason

MAX_BYTES_CHECKED_FOR_DUPLICATES = 65_536
"""A longer body is not read a second time to look for repeated keys: there the last of them applies."""


class JsonRequest(Request):
    """A request whose body is decoded once, by a parser that refuses what JSON does: NaN, numbers beyond a double,
    lone surrogates, bytes that are not UTF-8, nesting without end."""

    async def json(self) -> Any:
        if not hasattr(self, "_decoded"):
            self._decoded = _decode(await self.body())
        return self._decoded


class JsonRoute(APIRoute):
    """Route class of everything that takes a body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            if request.method == "POST":
                _check_headers(request)
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


class GenerationRoute(JsonRoute):
    """Route class of what generates: counts every request that is turned down, once, whoever did it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_counted(request: Request) -> Response:
            try:
                return await handle(request)
            except Exception as error:
                reason = rejection_reason(error)
                if reason is not None:
                    request.app.state.server.metrics.on_rejection(reason)
                raise

        return handle_counted


def _check_headers(request: Request) -> None:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "Content-Type must be application/json.", code="unsupported_media_type")
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        # A few bytes of gzip can be gigabytes of zeros.
        raise ApiError(415, "Compressed bodies are not accepted.", code="unsupported_media_type")


def _decode(body: bytes) -> Any:
    try:
        value = msgspec.json.decode(body)
    except RecursionError:
        raise invalid("the body's JSON is nested too deeply", code="invalid_json") from None
    except UnicodeDecodeError:
        raise invalid("the body is not UTF-8", code="invalid_json") from None
    except msgspec.MsgspecError as error:
        # msgspec names the place and the rule, not the content.
        raise invalid(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object", code="invalid_json")
    if len(body) < MAX_BYTES_CHECKED_FOR_DUPLICATES:
        _refuse_duplicate_keys(body)
    return value


def _refuse_duplicate_keys(body: bytes) -> None:
    """For JSON that is known to be valid. A second reading, since msgspec quietly keeps the last of equal keys."""

    def check(pairs: list[tuple[str, Any]]) -> None:
        if len(dict(pairs)) == len(pairs):
            return
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                shown = printable(name)
                raise invalid(f"the key {shown} is given more than once in an object", shown, "invalid_json")
            seen.add(name)

    try:
        json.loads(body, object_pairs_hook=check, parse_int=len, parse_float=len)
    except RecursionError:
        raise invalid("the body's JSON is nested too deeply", code="invalid_json") from None
