"""How bodies are read: JSON, strictly."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from ..errors import ApiError, invalid


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
    return value
