"""Bodies of responses that are not streamed. Built once per request; streams have their own templates."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length"]


class Result(BaseModel):
    # Ours alone build these, so that nothing needs to be checked twice; names like model_ are OpenAI's.
    model_config = ConfigDict(protected_namespaces=())


class PromptTokensDetails(Result):
    cached_tokens: int = 0


class CompletionTokensDetails(Result):
    reasoning_tokens: int = 0


class Usage(Result):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()

    @classmethod
    def of(cls, *, prompt: int, completion: int, cached: int) -> Usage:
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )

    @staticmethod
    def json_of(*, prompt: int, completion: int, cached: int) -> str:
        """`Usage.of(...)` as JSON, for chunks: a stream may ask for it with every token."""
        return (
            f'{{"prompt_tokens":{prompt},"completion_tokens":{completion},"total_tokens":{prompt + completion},'
            f'"prompt_tokens_details":{{"cached_tokens":{cached}}},"completion_tokens_details":{{"reasoning_tokens":0}}}}'
        )


class TopLogprob(Result):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Result):
    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(Result):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Result):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatCompletion(Result):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class CompletionLogprobs(Result):
    """Parallel arrays, one entry per token."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class CompletionChoice(Result):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(Result):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(Result):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "octavo"
    root: str
    max_model_len: int | None = None


class ModelList(Result):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResult(Result):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResult(Result):
    prompt: str


class ErrorBody(Result):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResult(Result):
    error: ErrorBody


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResult, "description": "The request is wrong, or not allowed now."},
    "5XX": {"model": ErrorResult, "description": "The server cannot answer now; Retry-After says when."},
}
