"""The HTTP application: routes, lifespan, middleware, error shapes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from ..scheduler.sampling_params import InvalidRequest
from .api.chat import chat_router
from .api.completions import completions_router
from .api.misc import model_router, probe_router, server_version, token_router
from .config import ServerConfig
from .engine.client import EngineClient, EngineUnavailable
from .errors import (
    handle_generation_failed,
    handle_http_exception,
    handle_invalid_request,
    handle_unavailable,
    handle_validation_error,
)
from .middleware import ApiKeyMiddleware, BodyLimitMiddleware, RequestContextMiddleware
from .outputs import GenerationFailed
from .state import ServerState
from .tokenizer import Tokenizer


def create_app(
    client: EngineClient,
    config: ServerConfig,
    tokenizer: Tokenizer,
    generation_defaults: Mapping[str, float] | None = None,
) -> FastAPI:
    """The app around an engine, which it starts and closes. It answers at once; `/ready` says when it serves.

    `generation_defaults` (from generation_config.json) apply where a request leaves a sampling parameter unset.
    The app's `ServerState` is at `app.state.server`; set its `draining` to refuse new requests.
    """
    server = ServerState(client, config, tokenizer, generation_defaults or {})

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        client.stats_listeners.append(server.metrics.on_step)
        await client.start()
        try:
            yield
        finally:
            await client.close()
            client.stats_listeners.remove(server.metrics.on_step)

    app = FastAPI(title="Octavo", version=server_version(), lifespan=lifespan, redirect_slashes=False, redoc_url=None)
    app.state.server = server
    for make_router in (chat_router, completions_router, model_router, token_router, probe_router):
        app.include_router(make_router(server))
    _handle_errors(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimitMiddleware, max_bytes=config.max_body_bytes)
    app.add_middleware(ApiKeyMiddleware, api_keys=config.api_keys)
    app.add_middleware(RequestContextMiddleware, metrics=server.metrics)
    return app


def _handle_errors(app: FastAPI) -> None:
    app.add_exception_handler(StarletteHTTPException, handle_http_exception)
    app.add_exception_handler(RequestValidationError, handle_validation_error)
    app.add_exception_handler(InvalidRequest, handle_invalid_request)
    app.add_exception_handler(EngineUnavailable, handle_unavailable)
    app.add_exception_handler(GenerationFailed, handle_generation_failed)
