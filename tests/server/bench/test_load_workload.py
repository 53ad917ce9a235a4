"""What the load generator sends, and when."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.server.bench.load_client import Record
from octavo.server.bench.load_probe import Target
from octavo.server.bench.load_run import Clock, Prepared, Run, closed_loop, open_loop, turns
from octavo.server.bench.load_settings import (
    ClosedLoop,
    LengthRange,
    OpenLoop,
    Slo,
    command_line,
    parse_seconds,
    read_settings,
)
from octavo.server.bench.load_workload import (
    WORDS,
    FilePrompt,
    PlannedRequest,
    PromptMaker,
    TextWords,
    TokenPieces,
    file_requests,
    poisson_arrivals,
    random_requests,
    read_prompts,
)
from octavo.server.options import OptionError

PIECES = TokenPieces(tuple((number, number + 1000) for number in range(50)))
SINGLE = TokenPieces(tuple((number,) for number in range(1000)))


def planned(maker: PromptMaker, count: int, **changes: Any) -> list[PlannedRequest]:
    options: dict[str, Any] = {
        "seed": 1,
        "scope": "0/0",
        "input_tokens": LengthRange(20, 90),
        "output_tokens": LengthRange(3, 9),
        "shared_prefix": 0.0,
        "chat": False,
    }
    return list(itertools.islice(random_requests(maker, **(options | changes)), count))


def ids(request: PlannedRequest) -> list[Any]:
    assert isinstance(request.prompt, list)
    return request.prompt


def common_prefix(one: list[Any], other: list[Any]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_prompts_of_token_ids_have_the_planned_length_exactly() -> None:
    requests = planned(PIECES, 200)
    assert all(len(ids(request)) == request.input_tokens for request in requests)
    assert {request.input_tokens for request in requests} <= set(range(20, 91))
    assert len({request.input_tokens for request in requests}) > 30
    assert {request.max_tokens for request in requests} == set(range(3, 10))


def test_the_same_seed_gives_the_same_requests_and_another_scope_others() -> None:
    assert planned(PIECES, 5) == planned(PIECES, 5)
    assert planned(PIECES, 5) != planned(PIECES, 5, seed=2)
    assert planned(PIECES, 5) != planned(PIECES, 5, scope="0/1")


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_the_shared_part_is_as_long_as_asked_for_and_shared_by_all(share: float) -> None:
    requests = planned(SINGLE, 20, shared_prefix=share)
    longest = max(requests, key=lambda request: request.input_tokens or 0)
    for request in requests:
        num_shared = round(share * len(ids(request)))
        assert ids(request)[:num_shared] == ids(longest)[:num_shared]
    if share < 1:
        ends = {tuple(ids(request)[round(share * len(ids(request))) :]) for request in requests}
        assert len(ends) == len(requests)


def test_nothing_is_shared_unless_asked_for_nor_between_scopes() -> None:
    requests = planned(SINGLE, 30)
    assert all(common_prefix(ids(a), ids(b)) < 4 for a, b in itertools.combinations(requests, 2))
    first, second = planned(SINGLE, 1, shared_prefix=1.0), planned(SINGLE, 1, shared_prefix=1.0, scope="1/0")
    assert common_prefix(ids(first[0]), ids(second[0])) < 4


def test_text_prompts_reach_the_planned_length_by_the_calibrated_cost_of_words() -> None:
    maker = TextWords(WORDS, tokens_per_word=1.5, overhead=10.0)
    for request in planned(maker, 50):
        assert isinstance(request.prompt, str)
        assert request.input_tokens is not None
        assert abs(1.5 * (len(request.prompt.split()) - 1) + 10.0 - request.input_tokens) <= 0.75
    (chat,) = planned(maker, 1, chat=True)
    assert isinstance(chat.prompt, list)
    assert chat.prompt[0]["role"] == "user"


def test_text_prompts_share_words() -> None:
    texts = [str(request.prompt).split()[1:] for request in planned(TextWords(WORDS), 10, shared_prefix=0.5)]
    for one, other in itertools.combinations(texts, 2):
        assert common_prefix(one, other) >= min(len(one), len(other)) // 2


def test_poisson_gaps_have_the_mean_and_the_spread_of_an_exponential() -> None:
    arrivals = poisson_arrivals(4.0, random.Random(7), num_requests=20_000)
    gaps = [after - before for before, after in itertools.pairwise([0.0, *arrivals])]
    assert len(gaps) == 20_000
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.03)


@given(st.floats(0.1, 50), st.integers(0, 1000), st.integers(0, 60), st.floats(0.1, 20))
def test_arrivals_keep_both_limits(rate: float, seed: int, count: int, duration: float) -> None:
    arrivals = poisson_arrivals(rate, random.Random(seed), num_requests=count, duration_s=duration)
    assert arrivals == sorted(arrivals)
    assert len(arrivals) <= count
    assert all(0 <= due < duration for due in arrivals)
    assert poisson_arrivals(rate, random.Random(seed), num_requests=count)[: len(arrivals)] == arrivals


def test_arrivals_need_an_end() -> None:
    with pytest.raises(ValueError, match="without end"):
        poisson_arrivals(1.0, random.Random(0))


# Files of prompts


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_plain_text_is_a_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "Why?\n\n  How so? \n")
    assert [prompt.prompt for prompt in read_prompts(path, chat=False)] == ["Why?", "How so?"]
    assert read_prompts(path, chat=True)[0].prompt == [{"role": "user", "content": "Why?"}]


def test_json_lines_hold_prompts_or_messages_and_limits(tmp_path: Path) -> None:
    messages = '[{"role": "user", "content": "Hi"}]'
    path = write(tmp_path, f'{{"prompt": "Why?", "max_tokens": 5}}\n{{"messages": {messages}}}\n')
    first, second = read_prompts(path, chat=True)
    assert (first.prompt, first.max_tokens) == ([{"role": "user", "content": "Why?"}], 5)
    assert (second.prompt, second.max_tokens) == ([{"role": "user", "content": "Hi"}], None)


def test_prompts_of_a_file_go_round_and_keep_their_own_limits(tmp_path: Path) -> None:
    prompts = read_prompts(write(tmp_path, '{"prompt": "a", "max_tokens": 5}\n{"prompt": "b"}\n'), chat=False)
    requests = file_requests(prompts, start=1, seed=0, scope="0/0", output_tokens=LengthRange(7, 7))
    taken = list(itertools.islice(requests, 3))
    assert [(request.prompt, request.max_tokens) for request in taken] == [("b", 7), ("a", 5), ("b", 7)]
    assert taken[0].input_tokens is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        ('{"prompt": "a"}\nplain', "line 2: is not JSON, as the file's first line is"),
        ('{"prompt": "a"}\n\n{"text": "b"}', 'line 3: expected an object with either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": [{}]}', 'expected an object with either "prompt" or "messages"'),
        ('{"prompt": ["a"]}', '"prompt" must be text'),
        ('{"messages": [{"role": "user"}]}', '"messages" need --endpoint chat'),
        ('{"messages": "a"}', '"messages" must be a list of objects'),
        ('{"prompt": "a", "max_tokens": 0}', '"max_tokens" must be a whole number, 1 or more'),
        ('{"prompt": "a", "max_tokens": true}', '"max_tokens" must be a whole number, 1 or more'),
    ],
)
def test_mistakes_in_a_file_are_named_by_their_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        read_prompts(write(tmp_path, text), chat=False)
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="No such file"):
        read_prompts(str(tmp_path / "none"), chat=False)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OptionError, match="not UTF-8"):
        read_prompts(str(tmp_path / "binary"), chat=False)


# Flags


def test_defaults_are_three_closed_loops_and_a_fresh_seed() -> None:
    first, second = read_settings({}, {}), read_settings({}, {})
    assert first.levels == (ClosedLoop(1), ClosedLoop(8), ClosedLoop(32))
    assert [first.num_requests_of(level) for level in first.levels] == [8, 32, 128]
    assert first.seed != second.seed
    assert (first.base_url, first.endpoint, first.api_key) == ("http://127.0.0.1:8000", "completions", None)


def test_flags_are_read() -> None:
    given = {
        "base_url": "https://example.org/api/v1/",
        "compare": "http://[::1]:9000",
        "rate": "2.5,10",
        "max_concurrency": "4",
        "input_tokens": "64-256",
        "duration": "2m",
        "timeout": "500ms",
        "seed": "7",
        "no_stream": True,
    }
    settings = read_settings(given, {})
    assert settings.urls == ("https://example.org/api", "http://[::1]:9000")
    assert settings.levels == (OpenLoop(2.5, 4), OpenLoop(10.0, 4))
    assert settings.num_requests_of(settings.levels[0]) is None
    assert (settings.duration_s, settings.timeout_s, settings.rounds, settings.seed) == (120.0, 0.5, 4, 7)
    assert settings.input_tokens == LengthRange(64, 256)
    assert not settings.stream
    assert read_settings({"slo": "ttft=0.5, tpot=50ms,e2e=10s"}, {}).slo == Slo(0.5, 0.05, 10.0)
    both = read_settings({"concurrency": "2,2", "rate": "1"}, {})
    assert both.levels == (ClosedLoop(2), OpenLoop(1.0))


@pytest.mark.parametrize(
    ("environ", "key"),
    [
        ({"OCTAVO_API_KEY": "one,two", "OPENAI_API_KEY": "three"}, "one"),
        ({"OPENAI_API_KEY": "three"}, "three"),
        ({"OCTAVO_API_KEY": ""}, None),
    ],
)
def test_the_key_may_come_from_the_environment(environ: dict[str, str], key: str | None) -> None:
    assert read_settings({}, environ).api_key == key
    assert read_settings({"api_key": "given"}, environ).api_key == "given"


def test_the_command_is_kept_without_its_keys() -> None:
    given = {"base_url": "http://h", "api_key": "sk-secret", "prompts": "my file", "no_stream": True}
    text = command_line(given | {"compare_api_key": "sk-other"})
    assert text == (
        "octavo bench serve --base-url http://h --api-key *** --prompts 'my file' --no-stream --compare-api-key ***"
    )
    settings = read_settings({"api_key": "sk-secret", "compare": "http://h", "compare_api_key": "sk-other"}, {})
    assert "sk-" not in repr(settings)
    assert (settings.api_key, settings.compare_api_key) == ("sk-secret", "sk-other")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"base_url": "localhost:8000"}, "--base-url: expected an address"),
        ({"base_url": "http://"}, "--base-url: expected an address"),
        ({"base_url": "http://h:99999"}, "--base-url: expected an address"),
        ({"base_url": "http://user:word@h"}, "without user name"),
        ({"compare": "http://h/?key=x"}, "--compare: expected an address without user name, query"),
        ({"endpoint": "responses"}, "--endpoint: expected one of completions, chat"),
        ({"concurrency": "1,zero"}, "--concurrency: expected a whole number, 1 or more"),
        ({"concurrency": "0"}, "--concurrency: expected a whole number, 1 or more"),
        ({"rate": "0"}, "--rate: expected requests per second above 0"),
        ({"rate": "nan"}, "--rate: expected requests per second above 0"),
        ({"max_concurrency": "4"}, "--max-concurrency limits arrivals at a --rate"),
        ({"input_tokens": "9-3"}, "--input-tokens: expected at least 1 token"),
        ({"input_tokens": "many"}, "--input-tokens: expected a number of tokens"),
        ({"shared_prefix": "50"}, "--shared-prefix: expected a share from 0 to 1"),
        ({"duration": "0"}, "--duration: expected a time above 0"),
        ({"slo": "ttft"}, "--slo: expected ttft=, tpot= and e2e="),
        ({"slo": "ttft=1,ttft=2"}, "--slo: expected ttft=, tpot= and e2e=, each at most once"),
        ({"slo": "e2e=soon"}, "--slo e2e: expected a time above 0"),
        ({"slo": "tpot=1", "no_stream": True}, "--slo tpot= needs streaming"),
        ({"prompts": "f", "input_tokens": "9"}, "--prompts and --input-tokens exclude each other"),
        ({"prompts": "f", "shared_prefix": "0.5"}, "--prompts and --shared-prefix exclude each other"),
        ({"compare_api_key": "k"}, "--compare-api-key needs --compare"),
        ({"output": "-", "markdown": "-"}, "cannot both go to standard output"),
        ({"api_key": "two words"}, "--api-key: a key consists of visible ASCII characters"),
    ],
)
def test_mistakes_in_flags_are_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        read_settings(given, {})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "user:word" not in str(caught.value)


@pytest.mark.parametrize(("text", "seconds"), [("1.5", 1.5), ("20ms", 0.02), ("3 s", 3.0), ("2m", 120.0), (".5", 0.5)])
def test_times_have_units(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


# Loops, on a clock that moves only when somebody sleeps


class VirtualClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def clock(self) -> Clock:
        return Clock(lambda: self.now_s, self._sleep)

    async def _sleep(self, seconds: float) -> None:
        for _ in range(10):  # what is due now runs before time goes on
            await asyncio.sleep(0)
        self.now_s += seconds


def prepared(count: int) -> Iterator[Prepared]:
    return iter([Prepared(PlannedRequest(str(index), None, 1), b"") for index in range(count)])


class Sender:
    """Answers when it is told to; `sent` holds (clock, when it was due) of every request."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.sent: list[tuple[float, float | None]] = []
        self.num_open = 0
        self.most_open = 0
        self.answers = asyncio.Semaphore(0)

    async def __call__(self, request: Prepared, due_s: float | None) -> Record:
        self.sent.append((self.clock.now_s, due_s))
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        await self.answers.acquire()
        self.num_open -= 1
        return Record(None, 1, due_s or self.clock.now_s, self.clock.now_s)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("never came true")


def test_an_open_loop_sends_when_it_is_due_even_if_nothing_has_been_answered() -> None:
    async def scenario() -> None:
        clock, done, lags = VirtualClock(), [], []
        send = Sender(clock)
        loop = asyncio.create_task(
            open_loop(prepared(3), [1.0, 1.5, 4.0], None, send, done.append, clock=clock.clock(), lagged=lags.append)
        )
        await until(lambda: len(send.sent) == 3)
        assert send.sent == [(1.0, 1.0), (1.5, 1.5), (4.0, 4.0)]
        assert (done, lags) == ([], [0.0, 0.0, 0.0])
        for _ in range(3):
            send.answers.release()
        await loop
        assert len(done) == 3

    asyncio.run(scenario())


def test_a_wait_for_a_free_slot_does_not_move_the_time_from_which_latency_counts() -> None:
    async def scenario() -> None:
        clock, done = VirtualClock(), []
        send = Sender(clock)
        loop = asyncio.create_task(
            open_loop(prepared(2), [1.0, 2.0], 1, send, done.append, clock=clock.clock(), lagged=lambda _: None)
        )
        await until(lambda: clock.now_s == 2.0)
        await asyncio.sleep(0)
        clock.now_s = 9.0
        send.answers.release()
        await until(lambda: len(send.sent) == 2)
        assert send.sent == [(1.0, 1.0), (9.0, 2.0)]
        send.answers.release()
        await loop
        assert send.most_open == 1
        assert done[1].intended_s == 2.0

    asyncio.run(scenario())


def test_a_closed_loop_keeps_its_number_of_requests_open_and_no_more() -> None:
    async def scenario() -> None:
        clock, done = VirtualClock(), []
        send = Sender(clock)
        loop = asyncio.create_task(closed_loop(prepared(5), 2, send, done.append, clock=clock.clock(), stop_at_s=None))
        for number in range(1, 6):
            await until(lambda number=number: len(send.sent) == min(5, number + 1))
            send.answers.release()
        await loop
        assert (len(done), send.most_open) == (5, 2)
        assert all(due is None for _, due in send.sent)

    asyncio.run(scenario())


def test_a_closed_loop_begins_nothing_after_its_time_but_waits_for_what_is_open() -> None:
    async def scenario() -> None:
        clock, done = VirtualClock(), []
        send = Sender(clock)
        loop = asyncio.create_task(
            closed_loop(prepared(100), 2, send, done.append, clock=clock.clock(), stop_at_s=10.0)
        )
        await until(lambda: len(send.sent) == 2)
        clock.now_s = 10.0
        send.answers.release()
        send.answers.release()
        await loop
        assert (len(send.sent), len(done)) == (2, 2)

    asyncio.run(scenario())


def test_two_servers_take_turns_so_that_drift_hits_both() -> None:
    assert turns(2, 4) == [[0, 1], [1, 0], [0, 1], [1, 0]]
    assert turns(1, 2) == [[0], [0]]


class TimedClient:
    """A server each of whose answers takes so long; `rounds` holds the prompts of each round."""

    def __init__(self, clock: VirtualClock, answer_s: float) -> None:
        self.clock, self.answer_s = clock, answer_s
        self.rounds: list[list[object]] = []

    def body(self, request: PlannedRequest) -> bytes:
        return b""

    async def send(self, request: PlannedRequest, body: bytes, intended_s: float | None) -> Record:
        self.rounds[-1].append(request.prompt)
        self.clock.now_s += self.answer_s
        return Record(None, 1, self.clock.now_s, self.clock.now_s)


class RoundStarts:
    """A `Progress` that tells the clients apart by the titles of their rounds."""

    def __init__(self, clients: dict[str, TimedClient]) -> None:
        self.clients = clients

    def begin_round(self, title: str, *_: object) -> None:
        self.clients[title[0]].rounds.append([])

    def finished(self, record: Record) -> None:
        pass

    def end_round(self, *_: object) -> None:
        pass


def test_rounds_against_the_clock_begin_at_the_same_prompt_of_the_file_on_both_servers() -> None:
    settings = read_settings(
        {"prompts": "f", "compare": "http://b", "concurrency": "1", "duration": "6", "rounds": "3", "warmup": "0"}, {}
    )
    clock = VirtualClock()
    clients = {"A": TimedClient(clock, 1.0), "B": TimedClient(clock, 3.0)}
    targets: list[Any] = [Target(client, None, None) for client in clients.values()]  # type: ignore[arg-type]
    prompts = [FilePrompt(str(index), 1) for index in range(100)]
    asyncio.run(Run(settings, targets, RoundStarts(clients), prompts, clock.clock()).run())
    assert clients["A"].rounds == [[str(index) for index in range(start, start + 6)] for start in (0, 6, 12)]
    assert clients["B"].rounds == [[str(start), str(start + 1)] for start in (0, 6, 12)]
