"""One response's worth of generation: one engine request per prompt, read as one stream of deltas."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from fastapi import Request
from fastapi.responses import Response

from ...scheduler.batch import TokenLogprobs
from ...scheduler.sampling_params import SamplingParams
from ..engine.messages import GenerateRequest, RequestError
from ..errors import rejection_reason, shutting_down
from ..outputs import GenerationFailed, GenerationStream, TextDelta
from ..sse import EventStream, event, until_disconnect
from ..state import ServerState
from .protocol import GenerationRequest
from .results import FinishReason, Result, Usage


@dataclass(slots=True)
class Choice:
    """One sample, complete."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    stop_reason: int | str | None = None


class Generation:
    """Several prompts' streams as one; a choice's index is prompt * n + sample.

    A context that closes it, unless an `EventStream` has taken that over (`hand_over`).
    """

    def __init__(self, response_id: str, streams: Sequence[GenerationStream], n: int) -> None:
        self.response_id = response_id
        self.created = int(time.time())
        self.num_choices = len(streams) * n
        self._streams = streams
        self._n = n
        self._pumps: list[asyncio.Task[None]] = []
        self._merged: asyncio.Queue[list[TextDelta] | Exception] = asyncio.Queue()
        self._handed_over = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None or not self._handed_over:
            self.close(refused=rejection_reason(error) is not None)

    def hand_over(self) -> None:
        """Another will close it."""
        self._handed_over = True

    @property
    def finished(self) -> bool:
        return all(stream.finished for stream in self._streams) and self._merged.empty()

    async def next(self) -> list[TextDelta]:
        """What has arrived, waiting for something; empty only at the end. Raises GenerationFailed."""
        if len(self._streams) == 1:
            return await self._streams[0].next()
        return await self._next_of_many()

    async def __aiter__(self) -> AsyncIterator[list[TextDelta]]:
        while deltas := await self.next():
            yield deltas

    async def _next_of_many(self) -> list[TextDelta]:
        """Everything that all prompts have brought since the last wake-up, so that it is one write."""
        if not self._pumps:
            self._pumps = [asyncio.create_task(self._pump(i, stream)) for i, stream in enumerate(self._streams)]
        if self.finished:
            return []
        deltas: list[TextDelta] = []
        while not deltas or not self._merged.empty():
            item = await self._merged.get()
            if isinstance(item, Exception):
                if not deltas:
                    raise item
                self._merged.put_nowait(item)  # what came before it is delivered first
                break
            deltas += item
        return deltas

    async def _pump(self, prompt_index: int, stream: GenerationStream) -> None:
        try:
            while deltas := await stream.next():
                for delta in deltas:
                    delta.index += prompt_index * self._n
                self._merged.put_nowait(deltas)
        except Exception as error:
            self._merged.put_nowait(error)

    def usage(self) -> Usage:
        """Tokens so far, over all prompts; a prompt counts once, however many samples it has."""
        return Usage.of(**self._num_tokens())

    def usage_json(self) -> str:
        return Usage.json_of(**self._num_tokens())

    def _num_tokens(self) -> dict[str, int]:
        texts = [stream.text for stream in self._streams]
        return {
            "prompt": sum([text.num_prompt_tokens for text in texts]),
            "completion": sum([text.num_completion_tokens for text in texts]),
            "cached": sum([text.num_cached_tokens for text in texts]),
        }

    async def collect(self) -> list[Choice]:
        """Every choice, complete, in order of index."""
        choices = [Choice() for _ in range(self.num_choices)]
        texts: list[list[str]] = [[] for _ in choices]
        async for deltas in self:
            for delta in deltas:
                choice = choices[delta.index]
                texts[delta.index].append(delta.text)
                choice.token_ids += delta.token_ids
                choice.logprobs += delta.logprobs or ()
                if delta.finish_reason is not None:
                    choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
        for choice, parts in zip(choices, texts, strict=True):
            choice.text = "".join(parts)
        return choices

    def close(self, *, refused: bool = False) -> None:
        """Release every request; `refused` as for a stream. Idempotent."""
        with contextlib.ExitStack() as closing:  # every one, even if another cannot be closed
            for pump in self._pumps:
                pump.cancel()
            for stream in self._streams:
                closing.callback(stream.close, refused=refused)


def begin(
    server: ServerState,
    request: Request,
    body: GenerationRequest,
    id_prefix: str,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
) -> Generation:
    """Submit one engine request per prompt: all or none. Raises InvalidRequest or EngineUnavailable."""
    response_id = f"{id_prefix}-{request.state.request_id}"
    salt = server.cache_salt(getattr(request.state, "api_key", None), body.cache_salt)
    now = time.monotonic()
    with contextlib.ExitStack() as on_failure:
        streams: list[GenerationStream] = []
        for index, (prompt, prompt_params) in enumerate(zip(prompts, params, strict=True)):
            stream = server.submit(
                GenerateRequest(
                    request_id=response_id if len(prompts) == 1 else f"{response_id}-{index}",
                    prompt_token_ids=prompt,
                    params=prompt_params,
                    priority=body.priority or 0,
                    cache_salt=salt,
                    arrival_time=now,
                )
            )
            on_failure.callback(stream.close, refused=True)
            streams.append(stream)
        on_failure.pop_all()
    return Generation(response_id, streams, params[0].n)


class FirstOutput:
    """A generation whose first output is there, so that a failure before it can still be an HTTP status."""

    def __init__(self, generation: Generation, first: list[TextDelta]) -> None:
        self._generation = generation
        self._first = first

    @classmethod
    async def of(cls, generation: Generation) -> FirstOutput:
        return cls(generation, await generation.next())

    async def __aiter__(self) -> AsyncIterator[list[TextDelta]]:
        deltas = self._first
        while deltas:
            yield deltas
            deltas = await self._generation.next()


def failure(error: Exception) -> RequestError:
    """The error that ends a stream."""
    if isinstance(error, GenerationFailed):
        return error.error
    return RequestError(code="internal_error", message="The server had an error while processing this request.")


async def respond_stream(
    request: Request,
    generation: Generation,
    events: Callable[[FirstOutput], AsyncGenerator[bytes, None]],
    headers: dict[str, str],
) -> Response:
    """Wait for the first output, whose failure is still an HTTP status, then stream. Takes the generation over."""
    first = await until_disconnect(request, FirstOutput.of(generation))
    last_words = event(shutting_down().body())
    response = EventStream(events(first), on_close=generation.close, last_words=last_words, headers=headers)
    generation.hand_over()
    return response


async def respond_complete(
    request: Request,
    generation: Generation,
    complete: Callable[[list[Choice]], Result],
    headers: dict[str, str],
) -> Response:
    """Wait for everything, unless the client leaves."""
    choices = await until_disconnect(request, generation.collect())
    return Response(complete(choices).model_dump_json(), media_type="application/json", headers=headers)


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """The header that names what was accepted without effect."""
    return {"X-Ignored-Params": ", ".join(names)} if names else {}
