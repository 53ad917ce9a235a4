"""Every way a request can fail, in the one shape that OpenAI clients understand.

`{"error": {"message", "type", "param", "code"}}`: an object, always, since clients show nothing of anything else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from ..scheduler.sampling_params import InvalidRequest
from .engine.client import EngineUnavailable
from .engine.messages import RequestError
from .outputs import GenerationFailed

MAX_REPORTED_ERRORS = 10
RETRY_AFTER_DRAINING_S = 10
MAX_NAME_CHARS = 64
"""A field name that the caller made up is repeated to them, but not at any length."""


class ApiError(HTTPException):
    """An error with its HTTP status and its OpenAI description.

    An HTTPException, because FastAPI turns anything else raised while a body is read into a bare 400.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        all_headers = dict(headers or {})
        if retry_after_s is not None:
            all_headers["Retry-After"] = str(max(1, int(retry_after_s)))
        super().__init__(status, message, headers=all_headers)
        self.message = message
        self.type = type
        self.param = param
        self.code = code

    def body(self) -> bytes:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        return Response(self.body(), self.status_code, headers=self.headers, media_type="application/json")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the caller's mistake."""
    return ApiError(400, message, param=param, code=code)


def not_supported(param: str, what: str | None = None) -> ApiError:
    """400 for a field that is known and does nothing here: better refused than ignored."""
    return invalid(f"{what or param} is not supported by this server", param, "unsupported_parameter")


def model_not_found(name: str) -> ApiError:
    shown = name if len(name) <= MAX_NAME_CHARS else name[:MAX_NAME_CHARS] + "…"
    return ApiError(404, f"The model `{shown}` does not exist here.", param="model", code="model_not_found")


def from_invalid_request(error: InvalidRequest, written_as: Mapping[str, str] | None = None) -> ApiError:
    """`written_as` maps a parameter to the name under which this caller gave it."""
    param, message = error.param, error.message
    for name, written in (written_as or {}).items():
        if param == name:
            param = written
        if name != "prompt":  # which in a message is the English word
            message = re.sub(rf"\b{name}\b", written, message)
    return invalid(message, param, error.code)


def from_unavailable(error: EngineUnavailable) -> ApiError:
    return ApiError(503, str(error), type="server_error", code="service_unavailable", retry_after_s=error.retry_after_s)


def from_request_error(error: RequestError, *, queue_retry_after_s: int = 1) -> ApiError:
    """A request that the engine took and could not finish."""
    if error.code == "invalid_request":
        return invalid(error.message, error.param)
    if error.code == "queue_full":
        return ApiError(
            429, error.message, type="rate_limit_error", code="rate_limit_exceeded", retry_after_s=queue_retry_after_s
        )
    if error.code == "engine_dead":
        return ApiError(503, error.message, type="server_error", code="engine_dead", retry_after_s=5)
    return ApiError(500, error.message, type="server_error", code="internal_error")


def rejection_reason(error: BaseException | None) -> str | None:
    """Why a generation request was turned down as a whole, as the metrics name it; None if it was not."""
    if isinstance(error, EngineUnavailable):
        return "unavailable"
    if isinstance(error, GenerationFailed):
        code = error.error.code
        return code if code in ("queue_full", "invalid_request") else None
    if isinstance(error, InvalidRequest | ApiError):
        if isinstance(error, ApiError) and error.status_code >= 500:
            return None
        return error.code if error.code in ("context_length_exceeded", "model_not_found") else "invalid_request"
    return "invalid_request" if isinstance(error, RequestValidationError) else None


def internal_error() -> ApiError:
    """500, without a word about the cause: that belongs in the log."""
    return ApiError(500, "The server had an error while processing this request.", type="server_error")


def shutting_down() -> ApiError:
    message = "The server is shutting down."
    return ApiError(503, message, type="server_error", code="service_unavailable", retry_after_s=RETRY_AFTER_DRAINING_S)


def from_validation(errors: Iterable[Mapping[str, Any]]) -> ApiError:
    """400 from pydantic's findings: their places and rules, never the values found there."""
    messages: list[str] = []
    first_param: str | None = None
    num_errors = 0
    for error in errors:
        num_errors += 1
        if num_errors > MAX_REPORTED_ERRORS:
            continue
        param = _location((*error.get("loc", ()), *_culprit(error)))
        if num_errors == 1:
            first_param = param
        messages.append(_describe(error, param))
    if num_errors > MAX_REPORTED_ERRORS:
        messages.append(f"and {num_errors - MAX_REPORTED_ERRORS} more")
    return invalid("; ".join(messages) or "the request is not valid", first_param)


def _culprit(error: Mapping[str, Any]) -> tuple[str, ...]:
    """The field to blame for what was found in a whole object, where the finding names it."""
    return (str(error["ctx"]["field"]),) if error.get("type") == "too_many_fields" else ()


def _location(loc: Iterable[Any]) -> str | None:
    parts = [printable(str(part)) for part in loc]
    if parts and parts[0] in ("body", "query", "path", "header"):
        parts = parts[1:]
    return ".".join(parts) or None


def _describe(error: Mapping[str, Any], param: str | None) -> str:
    kind = error.get("type")
    if kind == "extra_forbidden":
        return f"Unrecognized request argument supplied: {param}"
    if kind == "missing":
        return f"Missing required parameter: {param}" if param else "A JSON body is required"
    message = str(error.get("msg", "invalid value")).removeprefix("Value error, ")
    return f"{param}: {message}" if param else message


def printable(name: str) -> str:
    """A name that the caller made up, fit to be repeated in a message."""
    cut = name[:MAX_NAME_CHARS] + ("…" if len(name) > MAX_NAME_CHARS else "")
    return "".join(char if char.isprintable() else "?" for char in cut)


def _starlette_error(error: StarletteHTTPException) -> ApiError:
    if isinstance(error, ApiError):
        return error
    messages = {404: "There is no such route.", 405: "This method is not allowed here."}
    message = messages.get(error.status_code, str(error.detail))
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return ApiError(error.status_code, message, type=kind, code=code, headers=error.headers)


async def handle_http_exception(_: Request, error: Exception) -> Response:
    if not isinstance(error, StarletteHTTPException):
        raise error
    return _starlette_error(error).response()


async def handle_validation_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    return from_validation(error.errors()).response()


async def handle_invalid_request(_: Request, error: Exception) -> Response:
    if not isinstance(error, InvalidRequest):
        raise error
    return from_invalid_request(error).response()


async def handle_unavailable(_: Request, error: Exception) -> Response:
    if not isinstance(error, EngineUnavailable):
        raise error
    return from_unavailable(error).response()


async def handle_generation_failed(request: Request, error: Exception) -> Response:
    if not isinstance(error, GenerationFailed):
        raise error
    retry_after_s = request.app.state.server.metrics.drain_seconds()
    return from_request_error(error.error, queue_retry_after_s=retry_after_s).response()
