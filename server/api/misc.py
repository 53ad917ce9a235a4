"""Everything that generates nothing: models, tokenisation, probes, metrics."""

from __future__ import annotations

import asyncio
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from ..engine.client import EngineUnavailable
from ..errors import RETRY_AFTER_DRAINING_S, invalid
from ..metrics import CONTENT_TYPE
from ..state import ServerState
from .fields import Name, TokenIds, WireModel
from .generate import ignored_header
from .protocol import Messages, check_template_kwargs, ignored_by_template
from .results import ERRORS, DetokenizeResult, ModelCard, ModelList, TokenizeResult
from .routing import JsonRoute


class TokenizeRequest(WireModel):
    """Body of POST /tokenize: a text, or a conversation."""

    model: Name | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="Default: true for a prompt, false for messages.")
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(WireModel):
    """Body of POST /detokenize."""

    model: Name | None = None
    tokens: TokenIds


def server_version() -> str:
    try:
        return version("octavo")
    except PackageNotFoundError:
        return "unknown"


def model_router(server: ServerState) -> APIRouter:
    router = APIRouter(tags=["models"])

    def card(name: str) -> ModelCard:
        ready = server.client.ready
        return ModelCard(
            id=name,
            created=server.created,
            root=server.model_name,
            max_model_len=None if ready is None else ready.max_model_len,
        )

    @router.get("/v1/models", responses=ERRORS)
    async def list_models() -> ModelList:
        """The names under which the model is served."""
        return ModelList(data=[card(name) for name in server.config.served_model_names])

    @router.get("/v1/models/{id:path}", responses=ERRORS)
    async def get_model(id: str) -> ModelCard:
        """One of them."""
        server.check_model(id)
        return card(id)

    return router


def token_router(server: ServerState) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, tags=["tokens"])

    @router.post("/tokenize", responses=ERRORS)
    async def tokenize(body: TokenizeRequest, response: Response) -> TokenizeResult:
        """The token ids of a text or a conversation."""
        server.check_model(body.model)
        ready = server.client.ready
        if ready is None:
            raise EngineUnavailable(f"the engine is {server.client.state.value}", retry_after_s=5)
        tokens = await _tokenize(server, body)
        template = server.tokenizer.chat_template
        response.headers.update(ignored_header(ignored_by_template(body.chat_template_kwargs, template)))
        token_text = server.tokenizer.token_text
        return TokenizeResult(
            count=len(tokens),
            max_model_len=ready.max_model_len,
            tokens=tokens,
            token_strs=[token_text(token) for token in tokens] if body.return_token_strs else None,
        )

    @router.post("/detokenize", responses=ERRORS)
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResult:
        """The text of token ids, special tokens included."""
        server.check_model(body.model)
        if body.tokens and max(body.tokens) >= server.tokenizer.vocab_size:
            raise invalid(f"token ids must be below the vocabulary's size, {server.tokenizer.vocab_size}", "tokens")
        text = await asyncio.to_thread(server.tokenizer.decode, body.tokens, skip_special_tokens=False)
        return DetokenizeResult(prompt=text)

    return router


async def _tokenize(server: ServerState, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    if body.messages is None:
        for name in ("add_generation_prompt", "chat_template_kwargs"):
            if getattr(body, name) is not None:
                raise invalid(f"{name} is only allowed with messages", name)
        return await server.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    check_template_kwargs(body.chat_template_kwargs)
    text = await server.render_chat(
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        template_kwargs=body.chat_template_kwargs or {},
    )
    return await server.encode(text, add_special_tokens=bool(body.add_special_tokens))


def probe_router(server: ServerState) -> APIRouter:
    router = APIRouter(tags=["operation"])

    async def live() -> dict[str, str]:
        """200 as long as this process answers at all."""
        return {"status": "ok"}

    async def ready() -> JSONResponse:
        """200 while requests are being served, else 503 with the reason."""
        reason = server.why_not_ready()
        if reason is None:
            return JSONResponse({"status": "ready"})
        retry_after_s = RETRY_AFTER_DRAINING_S if server.draining else 1
        return JSONResponse({"status": "unavailable", "reason": reason}, 503, {"Retry-After": str(retry_after_s)})

    for name, probe in (("live", live), ("ready", ready), ("health", ready)):
        router.add_api_route(f"/{name}", probe, methods=["GET"], response_model=None, name=name)
        # The same with the body left out, which uvicorn does.
        router.add_api_route(f"/{name}", probe, methods=["HEAD"], response_model=None, include_in_schema=False)

    @router.get("/version")
    async def get_version() -> dict[str, str]:
        """This server's version."""
        return {"version": server_version()}

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(server.metrics.render(), media_type=CONTENT_TYPE)

    return router
