"""`octavo bench serve` against servers that answer, fail and count as they are told to."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from octavo.server.bench import load_probe, load_tables
from octavo.server.bench.load_client import LoadClient, Record, open_session
from octavo.server.bench.load_workload import PlannedRequest
from octavo.server.cli import main

DEADLINE_S = 60.0
MEASURED_TOKENS = 7
"""Asked for by measured and warm-up requests only, not by those that get to know the server."""
TEMPLATE_TOKENS = 5
KEY = "sk-very-secret"


@dataclass
class Behaviour:
    """Of one server. A word is a token."""

    tokenizer: str | None = "octavo"
    """octavo, llama, count, or None."""
    takes_ids: bool = True
    sends_usage: bool = True
    counts_per_chunk: bool = True
    tokens_per_chunk: int = 1
    refused: frozenset[str] = frozenset()
    ends_after: int = 10**9
    cached: int = 0
    api_key: str | None = None
    version: str = "1.2.3"
    look_ups: str = ""
    """"drop" or "stall": what becomes of /version, /props and /metrics."""
    said: str = f"scripted, for {KEY}"
    """With errors of HTTP."""
    fails: Callable[[int], str | None] = lambda number: None
    """Number of the measured request → how it fails."""


@dataclass
class FakeServer:
    behaviour: Behaviour = field(default_factory=Behaviour)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    hanging: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    @property
    def measured(self) -> list[dict[str, Any]]:
        limits = ("max_tokens", "max_completion_tokens")
        return [body for body in self.bodies if MEASURED_TOKENS in (body.get(limit) for limit in limits)]

    def __enter__(self) -> FakeServer:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(DEADLINE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._leaving.set)
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(DEADLINE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)
        self._loop.close()

    async def _start(self) -> str:
        self._leaving = asyncio.Event()
        app = web.Application()
        app.add_routes(
            [
                web.get("/v1/models", self._models),
                web.get("/version", self._version),
                web.get("/metrics", self._version),
                web.post("/tokenize", self._tokenize),
                web.post("/v1/completions", self._generate),
                web.post("/v1/chat/completions", self._generate),
            ]
        )
        self._runner = web.AppRunner(app, shutdown_timeout=DEADLINE_S)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _models(self, request: web.Request) -> web.Response:
        wanted = self.behaviour.api_key
        if wanted is not None and request.headers.get("Authorization") != f"Bearer {wanted}":
            return web.json_response({"error": {"message": "wrong key"}}, status=401)
        return web.json_response({"data": [{"id": "fake-model", "owned_by": "tests"}]})

    async def _version(self, request: web.Request) -> web.Response:
        if self.behaviour.look_ups == "drop":
            assert request.transport is not None
            request.transport.abort()
        if self.behaviour.look_ups == "stall":
            await self._leaving.wait()
        return web.json_response({"version": self.behaviour.version})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        kind = self.behaviour.tokenizer
        text = body.get("content" if kind == "llama" else "prompt")
        if kind is None:
            return web.json_response({"error": {"message": "no such route"}}, status=404)
        if text is None:
            return web.json_response({"error": {"message": "missing"}}, status=400)
        ids = [len(word) for word in text.split()]
        return web.json_response({"count": len(ids)} if kind == "count" else {"tokens": ids})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        refused = self.behaviour.refused & {*body, *(body.get("stream_options") or {})}
        prompt = body.get("prompt", body.get("messages"))
        takes_ids = self.behaviour.takes_ids or isinstance(prompt, str) or "messages" in body
        if refused or not takes_ids:
            return web.json_response({"error": {"message": f"unknown: {sorted(refused)}"}}, status=400)
        self.bodies.append(body)
        failure = self.behaviour.fails(len(self.measured) - 1) if body is (self.measured or [None])[-1] else None
        if failure and failure.isdigit():
            return web.json_response({"error": {"message": self.behaviour.said}}, status=int(failure))
        limit = body.get("max_tokens", body.get("max_completion_tokens"))
        num_tokens = limit if body.get("ignore_eos") else min(limit, self.behaviour.ends_after)
        if not body.get("stream"):
            return web.json_response({"choices": [{"text": "x"}], "usage": self._usage(prompt, num_tokens)})
        return await self._stream(request, body, num_tokens, failure)

    def _usage(self, prompt: Any, num_tokens: int) -> dict[str, Any] | None:
        if not self.behaviour.sends_usage:
            return None
        chat = isinstance(prompt, list) and isinstance(prompt[0], dict)
        text = prompt[0]["content"] if chat else prompt
        num_prompt = len(text.split()) + TEMPLATE_TOKENS * chat if isinstance(text, str) else len(text)
        details = {"cached_tokens": self.behaviour.cached}
        return {"prompt_tokens": num_prompt, "completion_tokens": num_tokens, "prompt_tokens_details": details}

    async def _stream(
        self, request: web.Request, body: dict[str, Any], num_tokens: int, failure: str | None
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        options = body.get("stream_options") or {}
        prompt = body.get("prompt", body.get("messages"))

        async def send(chunk: Any) -> None:
            await response.write(f"data: {chunk if isinstance(chunk, str) else json.dumps(chunk)}\n\n".encode())

        sent = 0
        while sent < num_tokens:
            sent = min(num_tokens, sent + self.behaviour.tokens_per_chunk)
            chunk: dict[str, Any] = {"choices": [{"text": "x ", "delta": {"content": "x "}, "finish_reason": None}]}
            if sent == num_tokens and failure != "cut":
                chunk["choices"][0]["finish_reason"] = "length"
            if self.behaviour.counts_per_chunk and options.get("continuous_usage_stats"):
                chunk["usage"] = self._usage(prompt, sent)
            await send(chunk)
            if failure == "reset":
                assert request.transport is not None
                request.transport.abort()
                return response
            if failure == "error event":
                await send({"error": {"message": "out of blocks"}})
                return response
            if failure == "malformed":
                await send("oops")
                return response
            if failure == "endless":
                await response.write(b"x" * 2**23)
                return response
            if failure == "hang":
                self.hanging.set()
                await self._leaving.wait()
                return response
        if failure != "cut":
            if options.get("include_usage") and self.behaviour.sends_usage:
                await send({"choices": [], "usage": self._usage(prompt, num_tokens)})
            await send("[DONE]")
        return response


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


@dataclass
class Outcome:
    status: int
    out: str
    err: str
    results: dict[str, Any]
    markdown: str

    @property
    def level(self) -> dict[str, Any]:
        (level,) = self.results["levels"]
        (stats,) = level["servers"]
        return dict(stats)


Bench = Callable[..., Outcome]


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Run the command with small settings, and read what it wrote."""
    monkeypatch.delenv("OCTAVO_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(url: str, *arguments: str) -> Outcome:
        output, markdown = tmp_path / "results.json", tmp_path / "results.md"
        small = ["--input-tokens", "16-24", "--output-tokens", str(MEASURED_TOKENS), "--warmup", "0"]
        if "--rate" not in arguments and "--concurrency" not in arguments:
            small += ["--concurrency", "2", "--num-requests", "6"]
        if "--prompts" in arguments:
            small = small[2:]
        files = ["--output", str(output), "--markdown", str(markdown)]
        status = main(["bench", "serve", "--base-url", url, *small, *files, *arguments])
        captured = capsys.readouterr()
        results = json.loads(output.read_text("utf-8")) if output.exists() and output.stat().st_size else {}
        text = markdown.read_text("utf-8") if markdown.exists() else ""
        return Outcome(status, captured.out, captured.err, results, text)

    return run


def test_everything_is_counted_as_the_server_counts_it(fake: FakeServer, bench: Bench) -> None:
    outcome = bench(fake.url)
    assert outcome.status == 0
    assert len(fake.measured) == 6
    assert all(16 <= len(body["prompt"]) <= 24 for body in fake.measured)
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in fake.measured)
    level = outcome.level
    assert (level["num_requests"], level["num_ok"], level["errors"]) == (6, 6, {})
    assert level["output"] == {"planned_mean": 7.0, "mean": 7.0, "exact": True}
    assert level["input"]["exact"] is True
    assert level["output_tokens_per_s"] * level["wall_s"] == pytest.approx(42)
    total = sum(len(body["prompt"]) for body in fake.measured) + 42
    assert level["total_tokens_per_s"] * level["wall_s"] == pytest.approx(total)
    assert 0 < level["ttft"]["p50"] <= level["e2e"]["p50"] <= level["e2e"]["max"]
    assert outcome.results["schema"] == "octavo-bench-serve"
    assert outcome.results["version"] == 1
    (server,) = outcome.results["servers"]
    assert (server["model"], server["version"], server["prompts_as"]) == ("fake-model", "1.2.3", "token ids")
    assert "prompt lengths exactly as planned" in outcome.out
    assert "| concurrency 2 | 6 | 0 |" in outcome.markdown
    assert "concurrency 2: 6 requests in" in outcome.err


@pytest.mark.parametrize(
    ("behaviour", "prompts_as"),
    [
        (Behaviour(tokenizer="llama"), "token ids"),
        (Behaviour(tokenizer="count"), "text"),
        (Behaviour(tokenizer=None), "text"),
        (Behaviour(takes_ids=False), "text"),
    ],
)
def test_prompts_have_the_wanted_length_whatever_the_server_offers(
    fake: FakeServer, bench: Bench, behaviour: Behaviour, prompts_as: str
) -> None:
    fake.behaviour = behaviour
    outcome = bench(fake.url)
    assert outcome.results["servers"][0]["prompts_as"] == prompts_as
    assert outcome.level["input"]["exact"] is True


def test_chats_are_calibrated_around_their_template(fake: FakeServer, bench: Bench) -> None:
    outcome = bench(fake.url, "--endpoint", "chat")
    assert outcome.level["input"]["exact"] is True
    assert all(16 <= len(body["messages"][0]["content"].split()) + 5 <= 24 for body in fake.measured)


def test_merged_chunks_are_told_apart_from_tokens_where_the_server_counts(fake: FakeServer, bench: Bench) -> None:
    fake.behaviour = Behaviour(tokens_per_chunk=3)
    level = bench(fake.url).level
    assert level["tokens_per_chunk"] == pytest.approx(7 / 3)
    assert level["output"]["exact"] is True


def test_chunks_are_named_chunks_where_the_server_does_not_count(fake: FakeServer, bench: Bench) -> None:
    fake.behaviour = Behaviour(counts_per_chunk=False, tokens_per_chunk=3)
    outcome = bench(fake.url)
    assert outcome.results["servers"][0]["counts_tokens_per_chunk"] is False
    assert "ITL per chunk, not per token" in outcome.out
    assert "2.33 tokens each on average" in outcome.out
    assert outcome.level["output"]["mean"] == 7.0


def test_without_usage_chunks_are_counted_and_it_says_so(fake: FakeServer, bench: Bench) -> None:
    fake.behaviour = Behaviour(sends_usage=False)
    outcome = bench(fake.url)
    assert outcome.status == 0
    assert outcome.level["output_tokens_per_s"] * outcome.level["wall_s"] == pytest.approx(42)
    assert outcome.level["total_tokens_per_s"] is None
    assert "the server sends no usage: output tokens are counted as chunks" in outcome.out
    assert "prompt lengths not known" in outcome.out


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ("ignore_eos", "refuses ignore_eos"),
        ("continuous_usage_stats", "refuses stream_options.continuous_usage_stats"),
        ("stream_options", "refuses stream_options,"),
        ("max_tokens", "takes max_completion_tokens only"),
    ],
)
def test_what_a_server_refuses_is_left_out_and_named(
    fake: FakeServer, bench: Bench, refused: str, message: str
) -> None:
    fake.behaviour = Behaviour(refused=frozenset({refused}))
    outcome = bench(fake.url)
    assert outcome.status == 0
    assert outcome.level["num_ok"] == 6
    assert message in outcome.out
    assert all(refused not in body for body in fake.measured)


def test_outputs_that_end_early_are_reported_as_shorter_than_planned(fake: FakeServer, bench: Bench) -> None:
    fake.behaviour = Behaviour(ends_after=3)
    outcome = bench(fake.url, "--no-ignore-eos")
    assert outcome.level["output"] == {"planned_mean": 7.0, "mean": 3.0, "exact": False}
    assert "output lengths not as planned: on average 3.0 for 7.0 tokens" in outcome.out


@pytest.mark.parametrize(
    ("failure", "kind", "said"),
    [
        ("429", "HTTP 429", "scripted, for ***"),
        ("500", "HTTP 500", "scripted, for ***"),
        ("reset", "connection reset", ""),
        ("error event", "error event", "out of blocks"),
        ("malformed", "malformed stream", "an event is no JSON object: oops"),
        ("endless", "malformed stream", "an event that does not end"),
        ("cut", "stream cut short", "the stream ended without a finish_reason or [DONE]"),
        ("hang", "timeout", "no complete answer within 0.3 s"),
    ],
)
def test_errors_are_counted_by_kind_and_leave_the_rest_alone(
    fake: FakeServer, bench: Bench, failure: str, kind: str, said: str
) -> None:
    fake.behaviour = Behaviour(fails=lambda number: failure if number in (1, 4) else None)
    outcome = bench(fake.url, "--api-key", KEY, *(("--timeout", "300ms") if failure == "hang" else ()))
    assert outcome.status == 0
    level = outcome.level
    if failure != "hang":  # on a loaded machine an honest answer may take that long too
        assert (level["num_requests"], level["num_ok"], level["errors"]) == (6, 4, {kind: 2})
    assert level["errors"][kind] >= 2
    assert said in level["error_examples"][kind]
    assert kind in outcome.out
    assert kind in outcome.markdown


def test_a_refused_connection_has_a_kind_of_its_own() -> None:
    async def send() -> Record:
        with socket.socket() as nobody:  # bound, so that nobody else listens there
            nobody.bind(("127.0.0.1", 0))
            root = f"http://127.0.0.1:{nobody.getsockname()[1]}"
            async with open_session() as session:
                client = LoadClient(session, root, "m", "completions", True, 0.0, DEADLINE_S)
                request = PlannedRequest("a", 1, 1)
                return await client.send(request, client.body(request))

    record = asyncio.run(send())
    assert record.error_kind == "connection refused"
    assert not record.ok


def test_the_exit_status_is_1_if_all_failed_or_if_any_failure_is_too_many(fake: FakeServer, bench: Bench) -> None:
    fake.behaviour = Behaviour(fails=lambda number: "500")
    assert bench(fake.url).status == 1
    fake.bodies.clear()
    fake.behaviour = Behaviour(fails=lambda number: "500" if number == 0 else None)
    assert bench(fake.url).status == 0
    fake.bodies.clear()
    assert bench(fake.url, "--fail-on-error").status == 1


def test_the_key_is_sent_and_never_shown(fake: FakeServer, bench: Bench, tmp_path: Path) -> None:
    fake.behaviour = Behaviour(api_key=KEY, fails=lambda number: "429" if number == 0 else None)
    outcome = bench(fake.url, "--api-key", KEY)
    assert outcome.status == 0
    assert outcome.level["num_ok"] == 5
    for shown in (outcome.out, outcome.err, outcome.markdown, json.dumps(outcome.results)):
        assert KEY not in shown
    assert "--api-key ***" in outcome.results["command"]


def test_the_other_server_never_gets_the_first_ones_key(fake: FakeServer, bench: Bench) -> None:
    with FakeServer(Behaviour(api_key=KEY)) as other:
        outcome = bench(fake.url, "--api-key", KEY, "--compare", other.url)
        assert outcome.status == 1
        assert f"octavo: {other.url} answers 401: it wants another --api-key" in outcome.err


def test_without_streaming_only_whole_answers_are_timed(fake: FakeServer, bench: Bench) -> None:
    outcome = bench(fake.url, "--no-stream", "--slo", "e2e=100")
    level = outcome.level
    assert not any(body.get("stream") for body in fake.measured)
    assert (level["num_ok"], level["ttft"], level["itl"], level["tpot"]) == (6, None, None, None)
    assert level["e2e"]["count"] == 6
    assert level["goodput"]["share"] == 1.0
    assert "Goodput (E2E ≤ 100,000 ms)" in outcome.out


def test_an_open_loop_sends_every_arrival(fake: FakeServer, bench: Bench) -> None:
    outcome = bench(fake.url, "--rate", "200", "--num-requests", "12", "--max-concurrency", "3")
    assert outcome.results["levels"][0]["load"] == {"kind": "open", "rate_per_s": 200.0, "max_concurrency": 3}
    assert outcome.level["num_ok"] == len(fake.measured) == 12
    assert outcome.level["client"]["send_lag_max_s"] >= 0


def test_levels_and_warm_up_follow_each_other(fake: FakeServer, bench: Bench) -> None:
    outcome = bench(fake.url, "--concurrency", "1,3", "--num-requests", "3", "--warmup", "2")
    assert [level["load"]["concurrency"] for level in outcome.results["levels"]] == [1, 3]
    assert len(fake.measured) == 2 + 3 + 3
    prompts = [tuple(body["prompt"]) for body in fake.measured]
    assert len(set(prompts)) == len(prompts)


def test_a_shared_prefix_is_shared_on_the_wire(fake: FakeServer, bench: Bench) -> None:
    bench(fake.url, "--shared-prefix", "0.5", "--input-tokens", "24")
    prompts = [body["prompt"] for body in fake.measured]
    assert len({tuple(prompt[:12]) for prompt in prompts}) == 1
    assert len({tuple(prompt) for prompt in prompts}) == 6


def test_more_cache_hits_than_planned_are_pointed_out(fake: FakeServer, bench: Bench) -> None:
    fake.behaviour = Behaviour(cached=12)
    outcome = bench(fake.url)
    assert 0.5 <= outcome.level["cached_share"] <= 0.75
    assert "more than they share by plan" in outcome.out


def test_prompts_of_a_file_are_sent_as_they_are(fake: FakeServer, bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one two"}\n{"prompt": "three", "max_tokens": 2}\n', encoding="utf-8")
    outcome = bench(fake.url, "--prompts", str(path))
    assert outcome.status == 0
    sent = [(body["prompt"], body["max_tokens"]) for body in fake.bodies[-6:]]
    assert sorted(sent) == sorted([("one two", MEASURED_TOKENS), ("three", 2)] * 3)
    assert outcome.results["workload"]["input_tokens"] is None
    assert outcome.results["servers"][0]["prompts_as"] == "file"


def test_two_servers_get_the_same_requests_in_turns(fake: FakeServer, bench: Bench) -> None:
    with FakeServer() as other:
        outcome = bench(fake.url, "--compare", other.url, "--rounds", "3")
        wanted = [json.dumps(body, sort_keys=True) for body in fake.measured]
        assert sorted(wanted) == sorted(json.dumps(body, sort_keys=True) for body in other.measured)
    assert len(set(wanted)) == 3 * 6
    (level,) = outcome.results["levels"]
    assert [stats["num_ok"] for stats in level["servers"]] == [18, 18]
    comparison = {one["metric"]: one for one in level["comparison"]}
    rate = comparison["output tokens/s"]
    assert rate["speed_ratio"] == pytest.approx(rate["first"] / rate["second"])
    latency = comparison["E2E p50"]
    assert latency["speed_ratio"] == pytest.approx(latency["second"] / latency["first"])
    assert len(rate["round_ratios"]) == 3
    rounds = [line.split(",")[0] for line in outcome.err.splitlines()]
    assert rounds == [f"{side} concurrency 2" for side in "ABBAAB"]
    assert "A against B" in outcome.out


def test_servers_with_different_abilities_get_prompts_in_the_same_form(fake: FakeServer, bench: Bench) -> None:
    with FakeServer(Behaviour(tokenizer=None)) as other:
        outcome = bench(fake.url, "--compare", other.url, "--rounds", "1")
        assert [body["prompt"] for body in fake.measured] == [body["prompt"] for body in other.measured]
    assert [server["prompts_as"] for server in outcome.results["servers"]] == ["text", "text"]


def test_a_server_against_itself_does_not_get_the_same_prompts_twice(fake: FakeServer, bench: Bench) -> None:
    bench(fake.url, "--compare", fake.url, "--rounds", "1")
    prompts = [tuple(body["prompt"]) for body in fake.measured]
    assert len(set(prompts)) == len(prompts) == 12


def test_results_to_standard_output_are_alone_there(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--concurrency", "1", "--num-requests", "1", "--warmup", "0"]
    assert main(["bench", "serve", "--base-url", fake.url, *small, "--output", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["complete"] is True
    assert "Throughput" in captured.err


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:9", "octavo: cannot reach http://127.0.0.1:9/v1/models"),
        ("nonsense", "octavo: --base-url: expected an address such as http://127.0.0.1:8000"),
    ],
)
def test_a_server_that_is_not_there_is_one_line(bench: Bench, url: str, message: str) -> None:
    outcome = bench(url)
    assert outcome.status == (2 if url == "nonsense" else 1)
    assert outcome.err.startswith(message)
    assert outcome.err.count("\n") == 1


def test_a_server_that_serves_nothing_is_one_line(fake: FakeServer, bench: Bench) -> None:
    fake.behaviour = Behaviour(refused=frozenset({"model"}))
    outcome = bench(fake.url)
    assert outcome.status == 1
    assert outcome.err.count("\n") == 1
    assert "failed a first request: HTTP 400: unknown: ['model'" in outcome.err


def test_a_place_that_cannot_be_written_is_noticed_before_anything_is_sent(
    fake: FakeServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "none" / "results.json"
    assert main(["bench", "serve", "--base-url", fake.url, "--output", str(path)]) == 2
    assert "--output: there is no directory" in capsys.readouterr().err
    assert fake.bodies == []


def test_a_run_that_never_began_leaves_no_file(bench: Bench, tmp_path: Path) -> None:
    assert bench("http://127.0.0.1:9").status == 1
    assert list(tmp_path.iterdir()) == []


def test_results_are_written_even_if_they_cannot_be_shown(
    fake: FakeServer, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("cannot be shown")

    monkeypatch.setattr(load_tables, "print_report", fail)
    with pytest.raises(RuntimeError, match="cannot be shown"):
        bench(fake.url)
    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["complete"] is True
    assert "## Throughput" in (tmp_path / "results.md").read_text("utf-8")


def test_results_are_shown_even_if_they_cannot_be_written(
    fake: FakeServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    fake.behaviour = Behaviour(fails=lambda number: path.mkdir(exist_ok=True))
    small = ["--concurrency", "1", "--num-requests", "1", "--warmup", "0", "--output-tokens", str(MEASURED_TOKENS)]
    assert main(["bench", "serve", "--base-url", fake.url, *small, "--output", str(path)]) == 2
    captured = capsys.readouterr()
    assert "Throughput" in captured.out
    assert f"octavo: cannot write {path}: Is a directory\n" in captured.err


def test_a_reader_that_leaves_costs_no_results(fake: FakeServer, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    command = [str(Path(sys.executable).with_name("octavo")), "bench", "serve", "--base-url", fake.url]
    small = ["--concurrency", "1", "--num-requests", "1", "--warmup", "0", "--output-tokens", str(MEASURED_TOKENS)]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*command, *small, "--output", str(output)],
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=DEADLINE_S,
        check=False,
    )
    os.close(writing)
    assert done.returncode == 141
    assert b"Traceback" not in done.stderr
    assert json.loads(output.read_text("utf-8"))["complete"] is True


@pytest.mark.parametrize("look_ups", ["drop", "stall"])
def test_a_gateway_that_answers_only_what_it_knows_is_measured(
    fake: FakeServer, bench: Bench, monkeypatch: pytest.MonkeyPatch, look_ups: str
) -> None:
    monkeypatch.setattr(load_probe, "LOOK_UP_TIMEOUT_S", 0.1)
    fake.behaviour = Behaviour(look_ups=look_ups)
    outcome = bench(fake.url)
    assert outcome.status == 0
    assert outcome.level["num_ok"] == 6
    (server,) = outcome.results["servers"]
    assert (server["version"], server["cache_config"]) == (None, {})


def test_what_a_server_says_is_neither_markup_nor_an_escape_sequence(fake: FakeServer, bench: Bench) -> None:
    hostile = "\x1b]0;owned\x07 \\[/a-z] [bold]:smile:"
    fake.behaviour = Behaviour(version=hostile, said=hostile, fails=lambda number: "500" if number == 1 else None)
    outcome = bench(fake.url)
    assert outcome.status == 0
    shown = "]0;owned \\[/a-z] [bold]:smile:"
    assert f"tests {shown}" in outcome.out
    assert outcome.out.count(shown) == 2
    for text in (outcome.out, outcome.err, outcome.markdown):
        assert "\x1b" not in text


def test_ctrl_c_reports_what_was_measured_until_then(fake: FakeServer, tmp_path: Path) -> None:
    fake.behaviour = Behaviour(fails=lambda number: "hang" if number == 3 else None)
    output = tmp_path / "results.json"
    command = [str(Path(sys.executable).with_name("octavo")), "bench", "serve", "--base-url", fake.url]
    command += ["--concurrency", "1", "--num-requests", "9", "--warmup", "0", "--output", str(output)]
    with subprocess.Popen(
        [*command, "--output-tokens", str(MEASURED_TOKENS)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert fake.hanging.wait(DEADLINE_S)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "interrupted: only what had ended by then" in out
    results = json.loads(output.read_text("utf-8"))
    assert results["complete"] is False
    (stats,) = results["levels"][0]["servers"]
    assert (stats["num_ok"], stats["num_requests"], stats["num_cancelled"]) == (3, 3, 1)
