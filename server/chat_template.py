"""From a conversation to the prompt that the model was trained on, by the template that comes with the model."""

from __future__ import annotations

from typing import Any

import jinja2

from .chat_sandbox import MAX_OUTPUT_CHARS, ChatEnvironment

_MAX_ERROR_CHARS = 300


class ChatTemplateError(ValueError):
    """The messages cannot be put into the template, or the template itself is wrong. One line, fit for a client."""


class ChatTemplate:
    """A compiled chat template. Safe to render from several threads at once."""

    def __init__(self, source: str | None, bos_token: str | None, eos_token: str | None) -> None:
        """source None: the model has no template, and every rendering says so.

        Raises ChatTemplateError if the template does not compile.
        """
        self._template = None if source is None else _compile(source)
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt. `kwargs` reach the template as variables; the caller decides which ones a client may set.

        Raises ChatTemplateError: no template, a refusal by the template itself, or limits of time and size exceeded.
        """
        if self._template is None:
            raise ChatTemplateError("this model has no chat template; use /v1/completions")
        reserved = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        return _render(self._template, {"documents": None, **self._tokens, **kwargs, **reserved})


def _compile(source: str) -> jinja2.Template:
    try:
        return ChatEnvironment().compile_template(source)
    except (jinja2.TemplateError, RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        raise ChatTemplateError(f"the model's chat template does not compile: {_one_line(error)}") from error


def _render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    environment = template.environment
    assert isinstance(environment, ChatEnvironment)  # made by _compile
    environment.budget.start()
    pieces: list[str] = []
    size = 0
    try:
        for piece in template.generate(**variables):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_OUTPUT_CHARS:
                raise ChatTemplateError(f"the chat template makes more than {MAX_OUTPUT_CHARS} characters")
    except ChatTemplateError:
        raise
    # A template is code over whatever a client sent: any exception out of it means that the two do not fit.
    except Exception as error:
        raise ChatTemplateError(f"the chat template refuses these messages: {_one_line(error)}") from error
    return "".join(pieces)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MAX_ERROR_CHARS else text[: _MAX_ERROR_CHARS - 1] + "…"
