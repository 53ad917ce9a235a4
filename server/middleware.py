"""Pure-ASGI middleware: who asks, how much they send, how long it took.

Nothing here reads a body ahead or wraps a response in another task, so streams pass through untouched.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, internal_error, shutting_down
from .metrics import Metrics

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset(("/health", "/live", "/ready", "/metrics", "/version"))
"""What needs no key: probes and scrapes. Every other path does, known or not, so that new routes fail closed."""
DOCUMENTATION_PATHS = frozenset(("/docs", "/openapi.json"))
"""To be read (GET) without a key, since a browser cannot send one: they describe the API and hold no data."""
UNMEASURED_PATHS = frozenset(("/health", "/live", "/ready", "/metrics"))
MAX_LABEL_CHARS = 128


class RequestContextMiddleware:
    """Outermost: gives the request its id, measures it, and turns what nobody caught into a 500."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": ""})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        id_header = (b"x-request-id", b"req_" + request_id.encode())
        status = 0
        started_at = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), id_header]
            await send(message)

        _log_label(scope, request_id)
        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = status or 499
        except asyncio.CancelledError:
            # The server's own doing, at its shutdown deadline: whoever still waits is told to try elsewhere.
            if not status:
                await shutting_down().response()(scope, receive, send_with_id)
            raise
        except Exception:
            # The cause goes to the log, under the id that the caller got; bodies are in neither.
            logger.exception("request req_%s failed", request_id)
            if status:
                raise  # half a response is out: only the closing connection can tell the caller
            await internal_error().response()(scope, receive, send_with_id)
        finally:
            self._measure(scope, status or 499, time.monotonic() - started_at)

    def _measure(self, scope: Scope, status: int, seconds: float) -> None:
        if scope["path"] not in UNMEASURED_PATHS:
            # The route's template, never the raw path, which callers could make up without end.
            handler = getattr(scope.get("route"), "path", None) or "none"
            self._metrics.on_http(handler, scope["method"], status, seconds)


class ApiKeyMiddleware:
    """Demands `Authorization: Bearer <key>` for every path but those listed above; without keys, lets all pass.

    Leaves the key in `scope["state"]["api_key"]`, from which the prefix cache's salt is derived.
    """

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        key = _bearer_token(scope)
        if key is None or not self._is_valid(key):
            message = "No API key was provided." if key is None else "The API key is not valid."
            hint = " Send it as a header: `Authorization: Bearer <key>`."
            challenge = {"WWW-Authenticate": "Bearer"}
            error = ApiError(401, message + hint, code="invalid_api_key", headers=challenge)
            await error.response()(scope, receive, send)
            return
        scope.setdefault("state", {})["api_key"] = key
        await self._app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        method, path = scope["method"], scope["path"]
        return (method in ("GET", "HEAD") and path in OPEN_PATHS) or (method == "GET" and path in DOCUMENTATION_PATHS)

    def _is_valid(self, key: bytes) -> bool:
        """Compares digests with every key, so that time tells neither length, prefix nor which one it was."""
        digest = hashlib.sha256(key).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches)


class BodyLimitMiddleware:
    """413 for a body over the limit, announced or chunked."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = _header(scope, b"content-length")
        if announced is not None and announced.isdigit() and int(announced[:20]) > self._max_bytes:
            await self._too_large().response()(scope, receive, send)
            return
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._max_bytes:
                    raise self._too_large()
            return message

        await self._app(scope, receive_limited, send)

    def _too_large(self) -> ApiError:
        # The rest of the body is not read, so the connection cannot be used again.
        return ApiError(
            413,
            f"The request body may have at most {self._max_bytes} bytes.",
            code="request_too_large",
            headers={"Connection": "close"},
        )


def _header(scope: Scope, name: bytes) -> bytes | None:
    """The value of a header, None if it is absent or given more than once."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    values = [value for key, value in headers if key.lower() == name]
    return values[0] if len(values) == 1 else None


def _bearer_token(scope: Scope) -> bytes | None:
    value = _header(scope, b"authorization")
    if value is None:
        return None
    scheme, _, token = value.strip().partition(b" ")
    return token.strip() or None if scheme.lower() == b"bearer" else None


def _log_label(scope: Scope, request_id: str) -> None:
    """A client's own request id is a label in our log and nothing else."""
    label = _header(scope, b"x-request-id")
    if label and logger.isEnabledFor(logging.DEBUG):
        logger.debug("request req_%s is the client's %r", request_id, label[:MAX_LABEL_CHARS])


def scope_state(scope: Any) -> dict[str, Any]:
    """What the middleware above left for the handlers."""
    state: dict[str, Any] = scope.setdefault("state", {})
    return state
