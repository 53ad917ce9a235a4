"""A conversation as the user of a terminal holds it: turns, undo, files. No network, no terminal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MAX_FILE_BYTES = 64 * 2**20


class ConversationError(ValueError):
    """A file that cannot be read or written as a conversation. One line, fit for the user."""


@dataclass(frozen=True, slots=True)
class Message:
    role: Literal["user", "assistant"]
    content: str
    stopped: bool = False
    """An answer that was cut off, by the user or by an error."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What the server counted for one answer, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None
    """Of the prompt; None where the server does not say."""


@dataclass(slots=True)
class Answer:
    """One answer, while it arrives and after. Times are monotonic, in seconds."""

    asked_at: float
    text: str = ""
    first_at: float | None = None
    last_at: float | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    stopped: bool = False

    def arrived(self, now: float) -> None:
        """Some of the answer, or of the thinking before it, came in."""
        self.first_at = now if self.first_at is None else self.first_at
        self.last_at = now

    def describe(self) -> list[str]:
        """Lines for /stats."""
        lines: list[str] = []
        if self.usage is None:
            lines.append("tokens       not known: the server counts them at the end of an answer")
        else:
            cached = self.usage.cached_tokens
            shown = "" if cached is None else f", {cached} of them from the prefix cache"
            lines.append(f"prompt       {self.usage.prompt_tokens} tokens{shown}")
            lines.append(f"answer       {self.usage.completion_tokens} tokens")
        lines.append(f"ended        {'stopped' if self.stopped else self.finish_reason or 'no reason given'}")
        if self.first_at is not None and self.last_at is not None:
            lines.append(f"first token  {self.first_at - self.asked_at:.2f} s after asking")
            duration_s = self.last_at - self.first_at
            if self.usage is not None and self.usage.completion_tokens > 1 and duration_s > 0:
                speed = (self.usage.completion_tokens - 1) / duration_s
                lines.append(f"speed        {speed:.1f} tokens/s after the first")
            lines.append(f"whole        {self.last_at - self.asked_at:.2f} s")
        return lines


class Conversation:
    """The messages so far. A question whose answer failed is not among them, but `unanswered`."""

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.messages: tuple[Message, ...] = ()
        self.unanswered: str | None = None

    def clear(self) -> None:
        self.messages, self.unanswered = (), None

    def add(self, question: str, answer: str, *, stopped: bool) -> None:
        self.messages += (Message("user", question), Message("assistant", answer, stopped))
        self.unanswered = None

    def take_back(self) -> str | None:
        """Remove the last question with its answer, and return the question; None if there is none."""
        if self.unanswered is not None:
            question, self.unanswered = self.unanswered, None
            return question
        asked = [index for index, message in enumerate(self.messages) if message.role == "user"]
        if not asked:
            return None
        question = self.messages[asked[-1]].content
        self.messages = self.messages[: asked[-1]]
        return question

    def request_messages(self, question: str) -> list[dict[str, str]]:
        """The API's form of the conversation with one more question."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns = [{"role": message.role, "content": message.content} for message in self.messages]
        return [*system, *turns, {"role": "user", "content": question}]

    def save(self, path: Path) -> int:
        """Write JSON messages; returns how many. Raises ConversationError."""
        items: list[dict[str, Any]] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for message in self.messages:
            items.append({"role": message.role, "content": message.content})
            if message.stopped:
                items[-1]["stopped"] = True
        try:
            path.write_text(json.dumps(items, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConversationError(f"cannot write {path}: {_reason(error)}") from None
        return len(items)

    def load(self, path: Path) -> int:
        """Replace the conversation by a file's; returns the number of messages. Raises ConversationError.

        Takes a list of messages, or an object whose `messages` is one, as a request's body has it.
        """
        items = _read_items(path)
        system: str | None = None
        messages: list[Message] = []
        for index, item in enumerate(items):
            role, content = _role_and_content(item, f"{path}: message {index + 1}")
            if role == "system":
                if index:
                    raise ConversationError(
                        f"{path}: message {index + 1} is a system prompt; only the first may be one"
                    )
                system = content
            else:
                stopped = item.get("stopped") is True
                messages.append(Message("user" if role == "user" else "assistant", content, stopped))
        self.system, self.messages, self.unanswered = system, tuple(messages), None
        return len(items)


def _read_items(path: Path) -> list[Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConversationError(f"{path} is too large for a conversation")
        content = json.loads(path.read_text(encoding="utf-8"))
    except ConversationError:
        raise
    except OSError as error:
        raise ConversationError(f"cannot read {path}: {_reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"{path} is not JSON: {str(error)[:100]}") from None
    items = content.get("messages") if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise ConversationError(f"{path} holds no list of messages")
    return items


def _role_and_content(item: Any, where: str) -> tuple[str, str]:
    role = item.get("role") if isinstance(item, dict) else None
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
        raise ConversationError(f"{where} has the role {str(role)[:20]!r}; system, user and assistant can be continued")
    content = item.get("content")
    if not isinstance(content, str):
        raise ConversationError(f"{where} has no text as its content")
    return role, content


def _reason(error: Exception) -> str:
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)[:100]
