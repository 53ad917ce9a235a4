"""The load generator's numbers, from exact timestamps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.server.bench.load_client import Record
from octavo.server.bench.load_compare import METRICS, Comparison, compare
from octavo.server.bench.load_settings import Slo
from octavo.server.bench.load_stats import (
    Distribution,
    Round,
    Stats,
    e2e_s,
    inter_token_s,
    longest_gap_s,
    meets,
    percentile,
    stats,
    tpot_s,
    ttft_s,
)
from octavo.server.bench.load_stream import StreamReader, error_text
from octavo.server.bench.load_tables import verdict
from octavo.server.client_events import Usage


def record(
    *, intended: float = 10.0, arrivals: list[tuple[float, int]] | None = None, end: float = 0.0, tokens: int = 0
) -> Record:
    arrivals = arrivals or []
    count = tokens or sum(items for _, items in arrivals)
    return Record(
        planned_input=4,
        max_tokens=count,
        intended_s=intended,
        sent_s=intended + 0.25,
        end_s=end or (arrivals[-1][0] if arrivals else intended),
        arrivals=arrivals,
        usage=Usage(prompt_tokens=4, output_tokens=count, cached_tokens=1),
        num_chunks=len(arrivals),
    )


def failed(kind: str) -> Record:
    return Record(4, 4, 10.0, 10.0, end_s=11.0, error_kind=kind, error_message=f"scripted {kind}")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_percentiles_are_numpys(values: list[float], share: float) -> None:
    expected = float(np.percentile(values, 100 * share))
    assert math.isclose(percentile(sorted(values), share), expected, rel_tol=1e-6, abs_tol=1e-6)


def test_distribution_of_nothing_is_nothing() -> None:
    assert Distribution.of([]) is None
    assert Distribution.of([2.0, 4.0]) == Distribution(2, 3.0, 3.0, pytest.approx(3.9), pytest.approx(3.98), 4.0)


def test_latencies_count_from_when_a_request_was_due() -> None:
    one = record(intended=10.0, arrivals=[(12.0, 1), (13.0, 1), (15.0, 1)], end=16.0)
    assert one.sent_s == 10.25
    assert ttft_s(one) == 2.0
    assert e2e_s(one) == 6.0
    assert tpot_s(one) == 2.0
    assert longest_gap_s(one) == 2.0


def test_tokens_that_arrive_together_share_the_gap_before_them() -> None:
    one = record(arrivals=[(11.0, 3), (12.0, 1), (14.0, 4)])
    assert inter_token_s(one) == [1.0, 0.5, 0.5, 0.5, 0.5]
    assert longest_gap_s(one) == 2.0


def test_one_token_has_no_time_per_output_token() -> None:
    one = record(arrivals=[(11.0, 1)])
    assert tpot_s(one) is None
    assert longest_gap_s(one) is None
    assert inter_token_s(one) == []
    assert meets(one, Slo(ttft_s=1.0, tpot_s=0.001))


def test_goodput_wants_every_limit_kept_and_counts_failures_as_misses() -> None:
    quick = record(arrivals=[(10.5, 1), (10.6, 1)])
    slow_start = record(arrivals=[(12.0, 1), (12.1, 1)])
    slow_tokens = record(arrivals=[(10.5, 1), (11.5, 1)])
    rounds = [Round(10.0, 14.0, [quick, slow_start, slow_tokens, failed("timeout")])]
    found = stats(rounds, Slo(ttft_s=0.5, tpot_s=0.2)).goodput
    assert found is not None
    assert found.share == 0.25
    assert found.requests_per_s == 0.25
    assert not meets(failed("timeout"), Slo())


def test_rates_are_over_the_time_of_all_rounds_and_leave_failures_out() -> None:
    answered = record(arrivals=[(11.0, 2), (12.0, 2)])
    found = stats([Round(10.0, 12.0, [answered, failed("HTTP 429")]), Round(20.0, 22.0, [answered])], None)
    assert (found.num_requests, found.num_ok, found.wall_s) == (3, 2, 4.0)
    assert found.requests_per_s == 0.5
    assert found.output_tokens_per_s == 2.0
    assert found.total_tokens_per_s == 4.0
    assert found.cached_share == 0.25
    assert found.errors == {"HTTP 429": 1}
    assert found.error_examples == {"HTTP 429": "scripted HTTP 429"}
    assert found.input.exact is True
    assert found.tokens_per_chunk == 2.0
    assert found.goodput is None


def test_lengths_tell_whether_the_plan_was_kept() -> None:
    short = record(arrivals=[(11.0, 2)])
    short.max_tokens = 6
    found = stats([Round(10.0, 12.0, [short, record(arrivals=[(11.0, 2)])])], None).output
    assert (found.exact, found.mean, found.planned_mean) == (False, 2.0, 4.0)
    unknown = record(arrivals=[(11.0, 2)])
    unknown.usage = Usage()
    found = stats([Round(10.0, 12.0, [unknown])], None).output
    assert (found.exact, found.mean) == (None, None)


def test_of_nothing_there_are_no_numbers_and_no_errors() -> None:
    found = stats([Round(10.0, 10.0)], Slo(e2e_s=1.0))
    assert (found.num_requests, found.requests_per_s, found.e2e) == (0, 0.0, None)
    assert found.goodput is not None
    assert found.goodput.share == 0.0


def served(seconds_per_token: float) -> Stats:
    arrivals = [(10.0 + seconds_per_token * index, 1) for index in range(1, 5)]
    return stats([Round(10.0, arrivals[-1][0], [record(arrivals=arrivals)])], None)


def test_a_ratio_above_one_says_that_the_first_server_is_faster_whichever_way_the_metric_runs() -> None:
    found = compare(served(0.1), served(0.2), [(served(0.1), served(0.2)), (served(0.1), served(0.15))])
    assert [one.metric for one in found] == [metric.name for metric in METRICS]
    for one in found:
        assert one.speed_ratio == pytest.approx(2.0)
        assert one.round_ratios == (pytest.approx(2.0), pytest.approx(1.5))
        assert one.is_clear
        assert verdict(one) == "2.00× faster"


def test_rounds_that_disagree_make_a_difference_unclear() -> None:
    assert verdict(Comparison("x", 1.0, 2.0, 0.5, (0.4, 0.7))) == "2.00× slower"
    assert verdict(Comparison("x", 1.0, 2.0, 0.5, (0.4, 1.1))) == "2.00× slower, not clear"
    assert verdict(Comparison("x", 1.0, 2.0, 0.5, (0.5,))) == "2.00× slower, not clear"


def test_a_metric_that_one_server_lacks_is_not_compared() -> None:
    without_tokens = stats([Round(10.0, 12.0, [record(tokens=4, end=12.0)])], None)
    names = [one.metric for one in compare(served(0.1), without_tokens, [])]
    assert names == ["requests/s", "output tokens/s", "E2E p50", "E2E p99"]


def event(text: str) -> bytes:
    return f"data: {text}\n\n".encode()


def test_chunks_count_by_the_tokens_they_announce() -> None:
    reader = StreamReader(counts_tokens=True)
    reader.feed(event('{"choices":[{"delta":{"role":"assistant","content":""}}],"usage":{"completion_tokens":0}}'), 1.0)
    reader.feed(event('{"choices":[{"delta":{"content":"a b"}}],"usage":{"completion_tokens":2}}'), 2.0)
    reader.feed(event('{"choices":[{"delta":{"content":""}}],"usage":{"completion_tokens": 5}}'), 3.0)
    reader.feed(
        event('{"choices":[{"delta":{},"finish_reason":"length"}],"usage":{"completion_tokens":5}}')
        + event(
            '{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":3}}}'
        )
        + event("[DONE]"),
        4.0,
    )
    assert reader.arrivals == [(2.0, 2), (3.0, 3)]
    assert (reader.done_s, reader.finished, reader.num_chunks, reader.num_counts) == (4.0, True, 1, 5)
    assert reader.usage() == Usage(7, 5, 3)


def test_without_counts_chunks_with_text_are_counted_and_those_of_one_read_are_one_arrival() -> None:
    reader = StreamReader(counts_tokens=False)
    reader.feed(event('{"choices":[{"text":""}]}'), 1.0)
    reader.feed(event('{"choices":[{"text": "a"}]}') + event('{"choices":[{"text":"b"}],"usage":null}'), 2.0)
    reader.feed(event('{"choices":[{"text":"\\"text\\":\\"x"}]}'), 3.0)
    assert reader.arrivals == [(2.0, 2), (3.0, 1)]
    assert reader.usage() == Usage()


def test_text_that_looks_like_an_error_is_text() -> None:
    reader = StreamReader(counts_tokens=False)
    reader.feed(event('{"choices":[{"text":"{\\"error\\": {\\"message\\": 1}}"}]}'), 1.0)
    reader.feed(event('{"choices":[{"text":"a"}],"error":null}'), 2.0)
    assert reader.error is None
    assert reader.num_items == 2


@pytest.mark.parametrize(
    "line",
    [
        'data: {"error":{"message":"out of memory","type":"server_error"}}',
        'data: {"object":"error","message":"out of memory","code":500,"error":null}',
        'error: {"code":500,"message":"out of memory","type":"server_error","error":null}',
        'data: {"error":"out of memory"}',
    ],
)
def test_error_events_are_understood_in_every_shape(line: str) -> None:
    reader = StreamReader(counts_tokens=False)
    reader.feed(f"{line}\n\n".encode(), 1.0)
    assert reader.error == "out of memory"


def test_an_event_that_is_no_object_is_malformed() -> None:
    reader = StreamReader(counts_tokens=False)
    reader.feed(event("Internal Server Error"), 1.0)
    assert reader.malformed == "an event is no JSON object: Internal Server Error"


def test_error_bodies_are_cut_to_one_line() -> None:
    assert error_text(b'{"error": {"message": "too\\nlong"}}') == "too long"
    assert error_text(b"<html>\n" + b"x" * 500).startswith("<html> x")
    assert len(error_text(b"x" * 500)) == 200
    assert error_text(b"\x1b[2Jgone \x9b") == "[2Jgone \ufffd"


def test_usage_of_strange_types_is_no_usage() -> None:
    reader = StreamReader(counts_tokens=False)
    reader.feed(event('{"usage":{"completion_tokens":3,"prompt_tokens":true,"prompt_tokens_details":[]}}'), 1.0)
    assert reader.usage() == Usage(None, 3, None)
