"""Stop strings and text assembly, without HTTP."""

from __future__ import annotations

import time

import msgspec
import pytest
from http_fakes import EOS, FIRST_TIMINGS, TIMINGS, TOKENIZER, fake_logprobs
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.scheduler.sampling_params import SamplingParams
from octavo.server.engine.messages import GenerateRequest, RequestError, RequestTimings, TokenOutput
from octavo.server.outputs import StopMatcher, TextAssembler, TextDelta


def assembler(**params: object) -> tuple[TextAssembler, list[int]]:
    request = GenerateRequest(request_id="r", prompt_token_ids=[1, 2], params=SamplingParams(**params))  # type: ignore[arg-type]
    aborted: list[int] = []
    return TextAssembler(request, TOKENIZER, aborted.append), aborted


def output(
    text: bytes | str = b"",
    *,
    finish: str | None = None,
    eos: bool = False,
    sample: int = 0,
    cached: int = 0,
    timings: RequestTimings | None = None,
) -> TokenOutput:
    ids = list(text.encode() if isinstance(text, str) else text) + ([EOS] if eos else [])
    return TokenOutput(
        request_id="r",
        sample_index=sample,
        token_ids=ids,
        logprobs=[fake_logprobs(token_id, 1) for token_id in ids],
        finish_reason=finish,  # type: ignore[arg-type]
        stop_token_id=EOS if eos else None,
        num_cached_tokens=cached,
        timings=timings,
    )


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Character by character: the stop string that is complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.booleans(),
)
def test_matches_do_not_depend_on_the_pieces(pieces: list[str], stops: list[str], include: bool) -> None:
    matcher = StopMatcher(tuple(stops), include_stop=include)
    shown, stop = "", None
    for piece in pieces:
        certain, stop = matcher.push(piece)
        shown += certain
        if stop is not None:
            break
        full = "".join(pieces)
        assert full.startswith(shown)
        # What is held back is no more than the possible beginning of a stop string.
        assert len(matcher._held) < max(map(len, stops))
    else:
        shown += matcher.flush()
    assert (shown, stop) == reference("".join(pieces), stops, include)


def test_only_a_possible_beginning_is_held_back() -> None:
    text, _ = assembler(stop=("STOP",))
    assert [delta.text for delta in text.process([output("a S")])] == ["a "]
    assert [delta.text for delta in text.process([output("T")])] == [""]
    assert [delta.text for delta in text.process([output("x")])] == ["STx"]


def test_tokens_after_a_stop_string_do_not_count() -> None:
    text, aborted = assembler(stop=("b",))
    (delta,) = text.process([output("abcd")])
    assert (delta.text, delta.token_ids, delta.finish_reason, delta.stop_reason) == ("a", [97, 98], "stop", "b")
    assert delta.logprobs is not None
    assert len(delta.logprobs) == 2
    assert text.num_completion_tokens == 2
    assert text.finished
    assert aborted == [0]
    assert text.process([output("late")]) == []


def test_no_abort_for_a_sample_that_the_engine_ended() -> None:
    text, aborted = assembler(stop=("b",))
    (delta,) = text.process([output("ab", finish="length")])
    assert (delta.finish_reason, delta.stop_reason) == ("stop", "b")
    assert aborted == []


@pytest.mark.parametrize("pieces", [["a", "b"], ["ab"], ["a", "x", "b"]])
def test_a_stop_string_ends_the_timings_too(pieces: list[str]) -> None:
    text, _ = assembler(stop=("b",), n=2)
    before = time.monotonic()
    for number, piece in enumerate(pieces):
        (delta,) = text.process([output(piece, sample=1, timings=FIRST_TIMINGS if number == 0 else None)])
    assert delta.timings is not None
    assert before <= delta.timings.last_token <= time.monotonic()
    assert msgspec.structs.replace(delta.timings, last_token=4.0) == FIRST_TIMINGS
    later = msgspec.structs.replace(FIRST_TIMINGS, first_token=before + 1e6)
    (delta,) = text.process([output("b", timings=later)])
    assert delta.timings is not None
    assert delta.timings.last_token == later.first_token  # no time is negative


@pytest.mark.parametrize("piece", ["ab", "ax"])
def test_the_engine_s_own_end_is_taken_where_it_has_one(piece: str) -> None:
    for first in ([], [output("x", timings=FIRST_TIMINGS)]):
        text, _ = assembler(stop=("b",))
        (delta,) = text.process([*first, output(piece, finish="length", timings=TIMINGS)])
        assert delta.timings == TIMINGS


def test_cached_tokens_are_those_of_the_first_sample() -> None:
    text, _ = assembler(n=2)
    text.process([output("a", cached=16)])
    text.process([output("a", cached=32), output("b", sample=1, cached=48)])
    assert text.num_cached_tokens == 16


def test_min_tokens_holds_for_stop_strings() -> None:
    text, _ = assembler(stop=("b",), min_tokens=3)
    (delta,) = text.process([output("abab")])
    assert delta.text == "aba"
    text, _ = assembler(stop=("ab",), min_tokens=3)
    (delta,) = text.process([output("abxxab")])
    assert delta.text == "abxx"


def test_a_stop_string_can_be_kept() -> None:
    text, _ = assembler(stop=("b",), include_stop_str_in_output=True)
    assert text.process([output("abc")])[0].text == "ab"


@pytest.mark.parametrize(("include", "expected"), [(False, "ab"), (True, "ab</s>")])
def test_the_stop_token_is_not_text_but_counts(include: bool, expected: str) -> None:
    text, _ = assembler(include_stop_str_in_output=include, skip_special_tokens=False)
    (delta,) = text.process([output("ab", finish="stop", eos=True)])
    assert (delta.text, delta.finish_reason, delta.stop_reason) == (expected, "stop", None)
    assert text.num_completion_tokens == 3


def test_held_text_is_released_at_the_end() -> None:
    text, _ = assembler(stop=("STOP",))
    deltas = text.process([output("a STO")]) + text.process([output(finish="stop", eos=True)])
    assert "".join(delta.text for delta in deltas) == "a STO"
    assert deltas[-1].finish_reason == "stop"


def test_an_incomplete_character_ends_as_a_replacement() -> None:
    text, _ = assembler(stop=("z",))
    deltas = text.process([output("é".encode()[:1])]) + text.process([output(b"a", finish="length")])
    assert "".join(delta.text for delta in deltas) == "\ufffda"


def test_one_delta_per_sample_and_wakeup() -> None:
    text, _ = assembler(n=2)
    deltas = text.process([output("a"), output("x", sample=1), output("b"), output("y", sample=1, finish="length")])
    found = [(delta.index, delta.text, delta.finish_reason) for delta in deltas]
    assert found == [(0, "ab", None), (1, "xy", "length")]
    assert not text.finished


def test_what_came_before_an_error_is_kept() -> None:
    text, _ = assembler(n=2)
    error = RequestError(code="internal_error", message="m")
    failed = TokenOutput(request_id="r", finish_reason="error", error=error)
    deltas: list[TextDelta] = text.process([output("a"), failed, output("b")])
    assert [delta.text for delta in deltas] == ["a"]
    assert text.error is error
    text, _ = assembler()
    assert text.process([TokenOutput(request_id="r", finish_reason="abort")]) == []
    assert text.error is not None
    assert text.error.code == "internal_error"
