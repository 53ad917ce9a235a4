"""Server-sent events, counts and errors, as every client of ours reads them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.server.client_events import EndlessEvent, EventSplitter, Usage, error_message, read_json, usage_of


@given(st.data())
def test_events_come_out_whole_however_they_are_cut(data: st.DataObject) -> None:
    stream = (
        b': ping\n\ndata: {"a":1}\r\n\r\nevent: x\ndata:{"b":2}\n\nid: 5\ndata: \xc3\xbc\ndata: two\n\n'
        b'error: {"c":3}\n\ndata: [DONE]\n\ndata: lost'
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    splitter = EventSplitter()
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert [event for piece in pieces for event in splitter.feed(piece)] == [
        b'{"a":1}',
        b'{"b":2}',
        b"\xc3\xbc\ntwo",
        b'{"c":3}',
        b"[DONE]",
    ]


@pytest.mark.parametrize("line", [b"x" * 100_000, b"data: " + b"x" * 100_000 + b"\n"])
def test_an_endless_event_is_given_up(line: bytes) -> None:
    splitter = EventSplitter()
    for _ in range(40):
        assert splitter.feed(line) == []
    with pytest.raises(EndlessEvent, match="does not end"):
        splitter.feed(line * 10)


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4}, Usage(3, 4)),
        ({"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}, Usage(3, None, 2)),
        ({"prompt_tokens": True, "completion_tokens": -1, "prompt_tokens_details": []}, Usage()),
        (None, Usage()),
    ],
)
def test_only_whole_numbers_are_counts(usage: Any, counted: Usage) -> None:
    assert usage_of({"usage": usage}) == counted


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "out\nof \x1b]0;blocks"}}, "out of ]0;blocks"),
        ({"error": "bare"}, "bare"),
        ({"error": {"code": 5}}, ""),
        ({"object": "error", "message": "whole"}, "whole"),
        ({"code": 500, "message": "whole", "type": "t", "error": None}, "whole"),
        ({"detail": "Not Found"}, "Not Found"),
        ({"detail": [{"loc": ["body"]}]}, ""),
        ({"error": {"message": "half a pair: \ud800"}}, "half a pair: \ufffd"),
        ({"choices": [], "error": None}, None),
        ({"choices": [], "detail": "of something else"}, None),
        ([], None),
    ],
)
def test_errors_are_understood_in_every_shape(body: Any, message: str | None) -> None:
    assert error_message(body) == message


def test_what_is_no_json_is_nothing() -> None:
    assert read_json(b"\xff") is None
    assert read_json("[" * 100_000) is None
