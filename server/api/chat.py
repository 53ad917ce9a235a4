"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...scheduler.sampling_params import InvalidRequest
from ..errors import from_invalid_request
from ..state import ServerState
from .chunks import ChatChunks
from .generate import Choice, begin, ignored_header, respond_complete, respond_stream
from .logprobs import LogprobsFormatter
from .protocol import ChatCompletionRequest, ignored_by_template
from .results import ERRORS, AssistantMessage, ChatChoice, ChatCompletion
from .routing import GenerationRoute


def chat_router(server: ServerState) -> APIRouter:
    router = APIRouter(route_class=GenerationRoute, tags=["generation"])

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERRORS)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Continue a conversation. With `stream`, answers with server-sent events."""
        try:
            return await _create(server, body, request)
        except InvalidRequest as error:
            raise from_invalid_request(error, body.written_as()) from error

    return router


async def chat_prompt(server: ServerState, body: ChatCompletionRequest) -> list[int]:
    """The token ids of a conversation, under the model's chat template."""
    text = await server.render_chat(
        body.messages,
        add_generation_prompt=body.add_generation_prompt is not False,
        template_kwargs=body.template_kwargs(),
    )
    # The template writes the special tokens itself.
    return await server.encode(text, add_special_tokens=bool(body.add_special_tokens))


async def _create(server: ServerState, body: ChatCompletionRequest, request: Request) -> Response:
    server.check_model(body.model)
    body.reject_unsupported()
    params = body.sampling_params(server)
    server.require_engine()
    prompt = await chat_prompt(server, body)
    formatter = None if params.logprobs is None else LogprobsFormatter(server.tokenizer, params.logprobs)
    headers = _headers(server, body)
    with begin(server, request, body, "chatcmpl", [prompt], [params]) as generation:

        def complete(choices: list[Choice]) -> ChatCompletion:
            return ChatCompletion(
                id=generation.response_id,
                created=generation.created,
                model=server.model_name,
                choices=[_choice(index, choice, body, formatter) for index, choice in enumerate(choices)],
                usage=generation.usage(),
                prompt_token_ids=prompt if body.return_token_ids else None,
            )

        if body.stream:
            chunks = ChatChunks(generation, body, server.model_name, formatter, [prompt])
            return await respond_stream(request, generation, chunks.events, headers)
        return await respond_complete(request, generation, complete, headers)


def _choice(index: int, choice: Choice, body: ChatCompletionRequest, formatter: LogprobsFormatter | None) -> ChatChoice:
    return ChatChoice(
        index=index,
        message=AssistantMessage(content=choice.text),
        logprobs=formatter.chat(choice.logprobs) if formatter else None,
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
        token_ids=choice.token_ids if body.return_token_ids else None,
    )


def _headers(server: ServerState, body: ChatCompletionRequest) -> dict[str, str]:
    ignored = body.ignored_params()
    ignored += ignored_by_template(body.chat_template_kwargs, server.tokenizer.chat_template)
    if body.reasoning_effort is not None:
        ignored += ignored_by_template({"reasoning_effort": body.reasoning_effort}, server.tokenizer.chat_template, "")
    return ignored_header(ignored)
