"""Turns, undo and files of a conversation, and the pieces of a streamed answer: no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from octavo.server.terminal.client import Piece, ServerError, parse_piece
from octavo.server.terminal.conversation import Answer, Conversation, ConversationError, Usage


def test_a_request_holds_the_system_prompt_and_all_turns() -> None:
    conversation = Conversation("Be brief.")
    conversation.add("Hi", "Hello", stopped=False)
    assert conversation.request_messages("And?") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "And?"},
    ]


def test_questions_are_taken_back_last_first() -> None:
    conversation = Conversation()
    conversation.add("one", "1", stopped=False)
    conversation.add("two", "2", stopped=True)
    conversation.unanswered = "three"
    assert [conversation.take_back() for _ in range(4)] == ["three", "two", "one", None]
    assert conversation.messages == ()


def test_a_saved_conversation_is_loaded_as_it_was(tmp_path: Path) -> None:
    conversation = Conversation("Be brief.")
    conversation.add("Hi", "Hello", stopped=False)
    conversation.add("Tell me", "Once up", stopped=True)
    path = tmp_path / "chat.json"
    assert conversation.save(path) == 5
    loaded = Conversation()
    loaded.unanswered = "something else"
    assert loaded.load(path) == 5
    assert (loaded.system, loaded.messages, loaded.unanswered) == (conversation.system, conversation.messages, None)
    roles = [item["role"] for item in json.loads(path.read_text())]
    assert roles == ["system", "user", "assistant", "user", "assistant"]


def test_the_body_of_a_request_can_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "body.json"
    path.write_text(json.dumps({"model": "x", "messages": [{"role": "user", "content": "Hi"}]}))
    conversation = Conversation("old")
    conversation.load(path)
    assert conversation.system is None
    assert conversation.take_back() == "Hi"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('"text"', "no list of messages"),
        ("{}", "no list of messages"),
        ('[{"role": "tool", "content": "x"}]', "message 1 has the role 'tool'"),
        ('[{"role": "user", "content": null}]', "message 1 has no text"),
        ('[{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]', "message 2 is a system prompt"),
        ("[1]", "message 1 has the role"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_loaded_changes_nothing(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "chat.json"
    if content is not None:
        path.write_text(content)
    conversation = Conversation("kept")
    conversation.add("Hi", "Hello", stopped=False)
    with pytest.raises(ConversationError, match=message) as caught:
        conversation.load(path)
    assert "\n" not in str(caught.value)
    assert conversation.system == "kept"
    assert len(conversation.messages) == 2


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConversationError, match=r"cannot write .*: No such file"):
        Conversation("x").save(tmp_path / "nowhere" / "chat.json")


def test_stats_come_from_usage_and_the_clock() -> None:
    answer = Answer(asked_at=10.0, first_at=10.5, last_at=12.5, finish_reason="stop", usage=Usage(100, 41, 64))
    assert answer.describe() == [
        "prompt       100 tokens, 64 of them from the prefix cache",
        "answer       41 tokens",
        "ended        stop",
        "first token  0.50 s after asking",
        "speed        20.0 tokens/s after the first",
        "whole        2.50 s",
    ]
    stopped = Answer(asked_at=10.0, first_at=10.5, last_at=12.5, stopped=True).describe()
    assert stopped[0].startswith("tokens       not known")
    assert not any(line.startswith("speed") for line in stopped)
    assert len(Answer(asked_at=1.0).describe()) == 2


@pytest.mark.parametrize(
    ("chunk", "piece"),
    [
        ({"choices": [{"delta": {"content": "Hi"}}]}, Piece(text="Hi")),
        ({"choices": [{"delta": {"reasoning_content": "Hm"}}]}, Piece(reasoning="Hm")),
        ({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": None}, Piece(finish_reason="stop")),
        ({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}, Piece(usage=Usage(3, 4, None))),
        ({"choices": [{"delta": None}]}, Piece()),
        ({"choices": "odd", "usage": {"prompt_tokens": "odd"}}, Piece()),
        ({}, Piece()),
    ],
)
def test_pieces_are_read_without_trust(chunk: dict[str, Any], piece: Piece) -> None:
    assert parse_piece(json.dumps(chunk).encode()) == piece


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ("nonsense", "not JSON"),
        ("[]", "not an object"),
        ('{"error": {"message": "engine\\u001b died"}}', "^engine died$"),
        ('{"error": "bare"}', "^bare$"),
        ('{"error": {"code": 5}}', "reports an error"),
        ('{"object": "error", "message": "whole"}', "^whole$"),
    ],
)
def test_a_failure_in_the_stream_is_one_line(event: str, message: str) -> None:
    with pytest.raises(ServerError, match=message):
        parse_piece(event.encode())
