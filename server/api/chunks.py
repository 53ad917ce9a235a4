"""Stream chunks rendered from prepared templates: per token, a few string joins and no JSON library.

Chat and text completions differ in what a choice holds (`ChatChunks.choice`, `CompletionChunks.choice`); what a
chunk is around its choice, the usage chunk and the error event are the same.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator

from ..errors import from_request_error
from ..outputs import GenerationFailed, TextDelta
from ..sse import DONE, event, json_string
from .generate import FirstOutput, Generation, failure
from .logprobs import LogprobsFormatter
from .protocol import GenerationRequest

logger = logging.getLogger(__name__)


class Chunks(ABC):
    """The chunks of one streamed response."""

    object_name: str

    def __init__(
        self,
        generation: Generation,
        body: GenerationRequest,
        model_name: str,
        formatter: LogprobsFormatter | None,
        prompts: list[list[int]],
    ) -> None:
        """`prompts`: the token ids of each, returned with the first chunks if asked for."""
        head = {
            "id": generation.response_id,
            "object": self.object_name,
            "created": generation.created,
            "model": model_name,
        }
        self._head = "data: " + json.dumps(head, separators=(",", ":"))[:-1]
        self._tail = ',"usage":null}\n\n' if body.include_usage else "}\n\n"
        self._generation = generation
        self._include_usage = body.include_usage
        self._continuous_usage = body.continuous_usage
        self._with_token_ids = bool(body.return_token_ids)
        self._formatter = formatter
        self._prompts = prompts

    @abstractmethod
    def opening(self) -> str:
        """What precedes the first token."""

    @abstractmethod
    def render(self, delta: TextDelta) -> str:
        """The chunks of one delta; empty if it shows nothing yet."""

    def chunk(self, choice: str) -> str:
        """One chunk around a rendered choice."""
        if self._continuous_usage:
            tail = f',"usage":{self._generation.usage_json()}}}\n\n'
            return f'{self._head},"choices":[{choice}]{tail}'
        return f'{self._head},"choices":[{choice}]{self._tail}'

    def shows(self, delta: TextDelta) -> bool:
        """Whether there is anything to send: text that is held back is not, the tokens behind it may be."""
        return bool(delta.text or delta.logprobs or (self._with_token_ids and delta.token_ids))

    def token_ids(self, delta: TextDelta) -> str:
        return f',"token_ids":{delta.token_ids}' if self._with_token_ids else ""

    async def events(self, outputs: FirstOutput) -> AsyncGenerator[bytes, None]:
        """One item per wake-up. After a failure: the error, and neither a finish nor [DONE]."""
        opening = self.opening()
        try:
            async for deltas in outputs:
                rendered = opening + "".join([self.render(delta) for delta in deltas])
                opening = ""
                if rendered:
                    yield rendered.encode()
        except Exception as error:
            if not isinstance(error, GenerationFailed):
                logger.exception("stream %s failed", self._generation.response_id)
            yield event(from_request_error(failure(error)).body())
            return
        if self._include_usage:
            yield f'{self._head},"choices":[],"usage":{self._generation.usage_json()}}}\n\n'.encode()
        yield DONE


class ChatChunks(Chunks):
    object_name = "chat.completion.chunk"

    def opening(self) -> str:
        """The role, once per choice: clients concatenate it if it comes again."""
        delta = '{"role":"assistant","content":""}'
        opening = "".join(
            self.chunk(f'{{"index":{index},"delta":{delta},"logprobs":null,"finish_reason":null}}')
            for index in range(self._generation.num_choices)
        )
        if self._with_token_ids:
            opening = opening.replace("}\n\n", f',"prompt_token_ids":{self._prompts[0]}}}\n\n', 1)
        return opening

    def render(self, delta: TextDelta) -> str:
        rendered = ""
        if self.shows(delta):
            logprobs = "null"
            if self._formatter is not None and delta.logprobs:
                logprobs = self._formatter.chat(delta.logprobs).model_dump_json()
            rendered = self.chunk(
                f'{{"index":{delta.index},"delta":{{"content":{json_string(delta.text)}}},"logprobs":{logprobs},'
                f'"finish_reason":null{self.token_ids(delta)}}}'
            )
        if delta.finish_reason is not None:
            rendered += self.chunk(
                f'{{"index":{delta.index},"delta":{{}},"logprobs":null,"finish_reason":"{delta.finish_reason}",'
                f'"stop_reason":{json.dumps(delta.stop_reason)}}}'
            )
        return rendered


class CompletionChunks(Chunks):
    object_name = "text_completion"

    def __init__(
        self,
        generation: Generation,
        body: GenerationRequest,
        model_name: str,
        formatter: LogprobsFormatter | None,
        prompts: list[list[int]],
        echoes: list[str],
    ) -> None:
        """`echoes`: the prompt's text for each choice, or nothing."""
        super().__init__(generation, body, model_name, formatter, prompts)
        self._echoes = echoes
        self._offsets = [0] * generation.num_choices

    def opening(self) -> str:
        if not self._echoes and not self._with_token_ids:
            return ""
        num_choices = self._generation.num_choices
        opening = ""
        for index in range(num_choices):
            text = json_string(self._echoes[index] if self._echoes else "")
            prompt = self._prompts[index * len(self._prompts) // num_choices]
            ids = f',"prompt_token_ids":{prompt}' if self._with_token_ids else ""
            opening += self.chunk(f'{{"index":{index},"text":{text},"logprobs":null,"finish_reason":null{ids}}}')
        return opening

    def render(self, delta: TextDelta) -> str:
        if delta.finish_reason is None and not self.shows(delta):
            return ""
        logprobs = "null"
        if self._formatter is not None and delta.logprobs:
            arrays = self._formatter.completion(delta.logprobs, self._offsets[delta.index])
            self._offsets[delta.index] = arrays.text_offset[-1] + len(arrays.tokens[-1])
            logprobs = arrays.model_dump_json()
        finish = "null"
        if delta.finish_reason is not None:
            finish = f'"{delta.finish_reason}","stop_reason":{json.dumps(delta.stop_reason)}'
        return self.chunk(
            f'{{"index":{delta.index},"text":{json_string(delta.text)},"logprobs":{logprobs},'
            f'"finish_reason":{finish}{self.token_ids(delta)}}}'
        )
