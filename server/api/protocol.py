"""Request bodies of the OpenAI API and its usual extensions.

Every field acts, or is refused by `reject_unsupported`, or is named in the `X-Ignored-Params` header.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import msgspec
from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ...scheduler.sampling_params import SamplingParams
from ..errors import invalid, not_supported
from ..state import ServerState
from .fields import MAX_MESSAGES, Content, Int64, LogitBias, Name, Prompts, Stop, TokenIds, WireModel

Role = Literal["system", "developer", "user", "assistant", "tool"]
TEMPLATE_KWARGS = {"enable_thinking": bool, "thinking": bool, "reasoning_effort": str}
"""What a request may pass to the model's chat template, and its type."""


class StreamOptions(WireModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(WireModel):
    """What chat and text completions share."""

    model: Name | None = None
    max_tokens: Int64 | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Int64 | None = None
    stop: Stop | None = None
    seed: Int64 | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: LogitBias | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: Int64 | None = Field(None, description="Keep the k most probable tokens.")
    min_p: float | None = Field(None, description="Drop tokens less probable than this share of the best one's.")
    repetition_penalty: float | None = None
    min_tokens: Int64 | None = None
    ignore_eos: bool | None = None
    stop_token_ids: TokenIds | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    priority: Int64 | None = Field(None, description="Lower is served earlier.")
    cache_salt: str | None = Field(None, description="Prefixes are shared only between equal salts.")

    user: Any = Field(None, description="Ignored.")
    store: Any = Field(None, description="Ignored.")
    metadata: Any = Field(None, description="Ignored.")
    service_tier: Any = Field(None, description="Ignored.")
    safety_identifier: Any = Field(None, description="Ignored.")
    prompt_cache_key: Any = Field(None, description="Ignored.")
    prompt_cache_retention: Any = Field(None, description="Ignored.")
    request_id: Any = Field(None, description="Ignored: request ids are the server's.")

    best_of: Int64 | None = Field(None, description="Only equal to n.")
    use_beam_search: bool | None = Field(None, description="Not supported.")
    prompt_logprobs: Any = Field(None, description="Not supported.")
    prompt_embeds: Any = Field(None, description="Not supported.")
    response_format: Any = Field(None, description="Only {'type': 'text'}.")
    structured_outputs: Any = Field(None, description="Not supported.")
    guided_json: Any = Field(None, description="Not supported.")
    guided_regex: Any = Field(None, description="Not supported.")
    guided_choice: Any = Field(None, description="Not supported.")
    guided_grammar: Any = Field(None, description="Not supported.")
    guided_decoding_backend: Any = Field(None, description="Not supported.")

    IGNORED: ClassVar[tuple[str, ...]] = (
        *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "request_id"),
    )
    UNSUPPORTED: ClassVar[tuple[str, ...]] = (
        *("prompt_logprobs", "prompt_embeds", "structured_outputs"),
        *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend"),
    )

    @property
    def num_samples(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def reject_unsupported(self) -> None:
        """Raises ApiError for what would otherwise be ignored without a word."""
        for name in self.UNSUPPORTED:
            if getattr(self, name) is not None:
                raise not_supported(name)
        if self.best_of is not None and self.best_of != self.num_samples:
            raise not_supported("best_of", "best_of other than n")
        if self.use_beam_search:
            raise not_supported("use_beam_search")
        if self.response_format is not None and self.response_format != {"type": "text"}:
            raise not_supported("response_format", "response_format other than {'type': 'text'}")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is only allowed when stream is true", "stream_options")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise invalid("max_tokens must be at least 1", "max_tokens")

    def ignored_params(self) -> list[str]:
        """The given fields that have no effect."""
        ignored = [name for name in self.IGNORED if getattr(self, name) is not None]
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            ignored.append("stream_options.include_obfuscation")
        return ignored

    def _sampling_params(self, server: ServerState, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Raises InvalidRequest for values outside their range."""
        return SamplingParams(
            n=self.num_samples,
            temperature=server.default("temperature", self.temperature, 1.0),
            top_p=server.default("top_p", self.top_p, 1.0),
            top_k=int(server.default("top_k", self.top_k, 0)),
            min_p=server.default("min_p", self.min_p, 0.0),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=server.default("repetition_penalty", self.repetition_penalty, 1.0),
            logit_bias=self.logit_bias or {},
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            stop=self.stop or (),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
            skip_special_tokens=self.skip_special_tokens is not False,
        )


class ToolCallFunction(WireModel):
    name: Name
    arguments: str


class ToolCall(WireModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: ToolCallFunction
    index: int | None = None


class ChatMessage(WireModel):
    """One turn of the conversation. What an assistant's message came with may be sent back as it was."""

    role: Role
    content: Content | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def num_chars(self) -> int:
        """About how much text it is; a little for each part, as empty ones cost something too."""
        total = 64 + len(self.content or "") + len(self.reasoning_content or "") + len(self.name or "")
        return total + sum(64 + len(call.function.arguments) for call in self.tool_calls or ())

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing_content", "content is required for this role")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: tool arguments as an object, absent fields absent."""
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.content or "",
        }
        for name in ("name", "tool_call_id", "reasoning_content"):
            value = getattr(self, name)
            if value is not None:
                message[name] = value
        if self.tool_calls:
            message["tool_calls"] = [_tool_call_for_template(call) for call in self.tool_calls]
        return message


def _tool_call_for_template(call: ToolCall) -> dict[str, Any]:
    try:
        # Not the standard library's parser, which lets lone surrogates through that no tokenizer takes.
        arguments = msgspec.json.decode(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = call.function.arguments
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def check_template_kwargs(kwargs: Mapping[str, Any] | None) -> None:
    """Raises ApiError for what no request may pass to a chat template."""
    for name, value in (kwargs or {}).items():
        if name not in TEMPLATE_KWARGS:
            known = ", ".join(TEMPLATE_KWARGS)
            raise invalid(f"chat_template_kwargs may hold only {known}", "chat_template_kwargs")
        if type(value) is not TEMPLATE_KWARGS[name]:
            kind = TEMPLATE_KWARGS[name].__name__
            raise invalid(f"chat_template_kwargs.{name} must be of type {kind}", "chat_template_kwargs")


def ignored_by_template(
    kwargs: Mapping[str, Any] | None, source: str | None, prefix: str = "chat_template_kwargs."
) -> list[str]:
    """The arguments, as the caller wrote them, that a chat template never mentions."""
    names = set(re.findall(r"\w+", source or "")) if kwargs else set()
    return [prefix + name for name in kwargs or () if name not in names]


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatCompletionRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64}}
    )

    messages: Messages
    max_completion_tokens: Int64 | None = None
    logprobs: bool | None = None
    top_logprobs: Int64 | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = Field(None, description="Passed to the chat template, where it knows it.")

    parallel_tool_calls: Any = Field(None, description="Ignored without tools.")
    tools: list[Any] | None = Field(None, description="Not supported unless empty.")
    tool_choice: Any = Field(None, description="Only 'none', or 'auto' without tools.")
    functions: list[Any] | None = Field(None, description="Not supported unless empty.")
    function_call: Any = Field(None, description="Only 'none', or 'auto' without functions.")
    modalities: Any = Field(None, description="Only ['text'].")
    audio: Any = Field(None, description="Not supported.")
    prediction: Any = Field(None, description="Not supported.")
    web_search_options: Any = Field(None, description="Not supported.")
    verbosity: Any = Field(None, description="Not supported.")
    chat_template: Any = Field(None, description="Not supported: the model's own is used.")
    continue_final_message: bool | None = Field(None, description="Not supported.")
    echo: bool | None = Field(None, description="Not supported.")
    documents: Any = Field(None, description="Not supported.")

    IGNORED: ClassVar[tuple[str, ...]] = (*GenerationRequest.IGNORED, "parallel_tool_calls")
    UNSUPPORTED: ClassVar[tuple[str, ...]] = (
        *GenerationRequest.UNSUPPORTED,
        *("audio", "prediction", "web_search_options", "verbosity", "chat_template", "documents"),
    )

    def reject_unsupported(self) -> None:
        super().reject_unsupported()
        for name in ("tools", "functions", "continue_final_message", "echo"):
            if getattr(self, name):
                raise not_supported(name)
        for name in ("tool_choice", "function_call"):
            if getattr(self, name) not in (None, "none", "auto"):
                raise not_supported(name)
        if self.modalities not in (None, ["text"]):
            raise not_supported("modalities", "modalities other than ['text']")
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs requires logprobs to be true", "top_logprobs")
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise invalid("max_tokens and max_completion_tokens differ", "max_completion_tokens")
            if self.max_completion_tokens < 1:
                raise invalid("max_completion_tokens must be at least 1", "max_completion_tokens")
        check_template_kwargs(self.chat_template_kwargs)

    def template_kwargs(self) -> dict[str, Any]:
        kwargs = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            kwargs.setdefault("reasoning_effort", self.reasoning_effort)
        return kwargs

    def sampling_params(self, server: ServerState) -> SamplingParams:
        max_tokens = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        return self._sampling_params(
            server, max_tokens=max_tokens, logprobs=(self.top_logprobs or 0) if self.logprobs else None
        )

    def written_as(self) -> dict[str, str]:
        """Parameter → the name under which this API gives it."""
        names = {"prompt": "messages", "logprobs": "top_logprobs"}
        if self.max_tokens is None:
            names["max_tokens"] = "max_completion_tokens"
        return names


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    model_config = ConfigDict(json_schema_extra={"example": {"prompt": "Once upon a time", "max_tokens": 64}})

    DEFAULT_MAX_TOKENS: ClassVar[int] = 16

    prompt: Prompts
    logprobs: Int64 | None = None
    echo: bool | None = None
    suffix: str | None = Field(None, description="Not supported.")

    def reject_unsupported(self) -> None:
        super().reject_unsupported()
        if self.suffix:
            raise not_supported("suffix")
        if self.echo and self.logprobs is not None:
            raise not_supported("echo", "echo together with logprobs")

    def sampling_params(self, server: ServerState, *, room: int) -> SamplingParams:
        """`room`: how many tokens the context has left; OpenAI's default of 16 gives way to it and to min_tokens."""
        max_tokens = self.max_tokens
        # Without room for one token the engine's check refuses the prompt, in its own words.
        if max_tokens is None and room > 0:
            max_tokens = min(room, max(self.DEFAULT_MAX_TOKENS, self.min_tokens or 0))
        return self._sampling_params(server, max_tokens=max_tokens, logprobs=self.logprobs)
