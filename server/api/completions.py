"""POST /v1/completions."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ...scheduler.sampling_params import InvalidRequest
from ..errors import from_invalid_request
from ..state import ServerState
from .chunks import CompletionChunks
from .fields import Prompt
from .generate import Choice, begin, ignored_header, respond_complete, respond_stream
from .logprobs import LogprobsFormatter
from .protocol import CompletionRequest
from .results import ERRORS, Completion, CompletionChoice
from .routing import GenerationRoute


def completions_router(server: ServerState) -> APIRouter:
    router = APIRouter(route_class=GenerationRoute, tags=["generation"])

    @router.post("/v1/completions", response_model=Completion, responses=ERRORS)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts. With `stream`, answers with server-sent events."""
        try:
            return await _create(server, body, request)
        except InvalidRequest as error:
            raise from_invalid_request(error) from error

    return router


async def _create(server: ServerState, body: CompletionRequest, request: Request) -> Response:
    server.check_model(body.model)
    body.reject_unsupported()
    max_model_len = server.require_engine().max_model_len
    # Once with all the room there is: what is wrong with the parameters is found before anything is tokenised.
    params = body.sampling_params(server, room=max_model_len)
    server.check_fan_out(len(body.prompt), params)
    prompts = await server.encode_all(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    echoes: list[str] = []
    if body.echo:
        for prompt, ids in zip(body.prompt, prompts, strict=True):
            echoes += [await _echo(server, prompt, ids)] * params.n
    formatter = None if params.logprobs is None else LogprobsFormatter(server.tokenizer, params.logprobs)
    all_params = [body.sampling_params(server, room=max_model_len - len(ids)) for ids in prompts]
    headers = ignored_header(body.ignored_params())
    with begin(server, request, body, "cmpl", prompts, all_params) as generation:

        def complete(choices: list[Choice]) -> Completion:
            return Completion(
                id=generation.response_id,
                created=generation.created,
                model=server.model_name,
                choices=[
                    CompletionChoice(
                        index=index,
                        text=(echoes[index] if echoes else "") + choice.text,
                        logprobs=formatter.completion(choice.logprobs, 0) if formatter else None,
                        finish_reason=choice.finish_reason,
                        stop_reason=choice.stop_reason,
                        token_ids=choice.token_ids if body.return_token_ids else None,
                        prompt_token_ids=prompts[index // params.n] if body.return_token_ids else None,
                    )
                    for index, choice in enumerate(choices)
                ],
                usage=generation.usage(),
            )

        if body.stream:
            chunks = CompletionChunks(generation, body, server.model_name, formatter, prompts, echoes)
            return await respond_stream(request, generation, chunks.events, headers)
        return await respond_complete(request, generation, complete, headers)


async def _echo(server: ServerState, prompt: Prompt, ids: list[int]) -> str:
    """A text prompt is repeated as it was written, one of token ids as its text."""
    if isinstance(prompt, str):
        return prompt
    return await asyncio.to_thread(server.tokenizer.decode, ids, skip_special_tokens=False)
