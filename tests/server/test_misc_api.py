"""Models, tokenisation, probes and the engine's states as HTTP shows them."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import httpx
import pytest
from http_fakes import (
    READY,
    FakeEngineClient,
    LiveServer,
    chat,
    error_of,
    events,
    fails,
    make_app,
    says,
    serving,
    streamed_texts,
    wait_until,
)
from octavo.server.api.chunks import ChatChunks
from octavo.server.engine.client import EngineState

pytestmark = pytest.mark.anyio
CHAT = "/v1/chat/completions"


async def test_models(http: httpx.AsyncClient) -> None:
    body = (await http.get("/v1/models")).json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["fake", "alias"]
    card = body["data"][0]
    assert (card["object"], card["owned_by"], card["root"], card["max_model_len"]) == ("model", "octavo", "fake", 512)
    assert (await http.get("/v1/models/alias")).json()["id"] == "alias"
    assert error_of(await http.get("/v1/models/org/other"), 404)["code"] == "model_not_found"


async def test_a_model_name_with_a_slash(engine: FakeEngineClient) -> None:
    async with serving(make_app(engine, served_model_names=("org/model",))) as http:
        assert (await http.get("/v1/models/org/model")).json()["id"] == "org/model"


async def test_tokenize_and_detokenize(http: httpx.AsyncClient) -> None:
    body = (await http.post("/tokenize", json={"model": "fake", "prompt": "hi", "return_token_strs": True})).json()
    assert body == {"count": 3, "max_model_len": 512, "tokens": [256, 104, 105], "token_strs": ["<s>", "h", "i"]}
    body = (await http.post("/tokenize", json={"prompt": "hi", "add_special_tokens": False})).json()
    assert (body["tokens"], body["token_strs"]) == ([104, 105], None)
    messages = [{"role": "user", "content": "hi"}]
    body = (await http.post("/tokenize", json={"messages": messages, "add_generation_prompt": False})).json()
    assert body["tokens"] == [256, *b"[user]hi"]
    body = (await http.post("/detokenize", json={"tokens": [256, 104, 105]})).json()
    assert body == {"prompt": "<s>hi"}
    assert (await http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


async def test_tokenize_counts_as_chat_does(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    for kwargs in ({}, {"enable_thinking": True}, {"enable_thinking": False, "reasoning_effort": "low"}):
        fields = chat(chat_template_kwargs=kwargs)
        counted, generated = [await http.post(url, json=fields) for url in ("/tokenize", CHAT)]
        assert counted.json()["tokens"] == engine.requests[-1].prompt_token_ids
        assert counted.headers.get("x-ignored-params") == generated.headers.get("x-ignored-params")
    for fields in (chat(chat_template_kwargs={"messages": []}), chat(chat_template_kwargs={"thinking": "yes"}),
                   {"prompt": "a", "chat_template_kwargs": {"thinking": True}}):  # fmt: skip
        assert error_of(await http.post("/tokenize", json=fields), 400)["param"] == "chat_template_kwargs"


def tool_call(arguments: str) -> dict[str, object]:
    return {"function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("message", "in_thread"),
    [
        ({"role": "user", "content": "x"}, False),
        ({"role": "user", "content": "x" * 20_000}, True),
        ({"role": "user", "content": "x", "name": "x" * 20_000}, True),
        ({"role": "assistant", "reasoning_content": "x" * 20_000}, True),
        ({"role": "assistant", "tool_calls": [tool_call("[" + "1," * 9000 + "1]")]}, True),
        ({"role": "assistant", "tool_calls": [tool_call("")] * 300}, True),
    ],
)
async def test_long_conversations_are_rendered_off_the_loop(
    engine: FakeEngineClient, message: dict[str, object], in_thread: bool
) -> None:
    app = make_app(engine)
    template = app.state.server.chat_template
    threads: list[threading.Thread] = []

    def render(messages, **kwargs):  # type: ignore[no-untyped-def]
        threads.append(threading.current_thread())
        return template.render(messages, **kwargs)

    app.state.server.chat_template = SimpleNamespace(render=render)
    async with serving(app) as http:
        assert (await http.post("/tokenize", json={"messages": [message]})).status_code == 200
    assert (threads[0] is not threading.current_thread()) == in_thread


async def test_tokenize_refusals(http: httpx.AsyncClient) -> None:
    for body in ({}, {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, {"prompt": 1}):
        error_of(await http.post("/tokenize", json=body), 400)
    error_of(await http.post("/tokenize", json={"prompt": "a", "model": "x"}), 404)
    for tokens in ([259], [-1], [2**40], ["a"], "a", None):
        assert error_of(await http.post("/detokenize", json={"tokens": tokens}), 400)["param"] == "tokens"


async def test_long_texts_are_tokenised_off_the_loop(http: httpx.AsyncClient) -> None:
    body = (await http.post("/tokenize", json={"prompt": "x" * 100_000})).json()
    assert body["count"] == 100_001


async def test_docs_describe_the_bodies(http: httpx.AsyncClient) -> None:
    assert (await http.get("/docs")).status_code == 200
    schema = (await http.get("/openapi.json")).json()
    properties = schema["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"messages", "temperature", "top_k"} <= properties.keys()


async def test_starting_engine(engine: FakeEngineClient) -> None:
    engine = FakeEngineClient(ready=False)
    async with serving(make_app(engine)) as http:
        assert (await http.get("/live")).status_code == 200
        assert (await http.get("/version")).json().keys() == {"version"}
        for path in ("/ready", "/health"):
            response = await http.get(path)
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            assert "starting" in response.json()["reason"]
        assert (await http.get("/v1/models")).json()["data"][0]["max_model_len"] is None
        for url, body in ((CHAT, chat()), ("/v1/completions", {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
            response = await http.post(url, json=body)
            error_of(response, 503)
            assert int(response.headers["retry-after"]) >= 1
        engine.handle(READY)
        assert (await http.get("/ready")).json() == {"status": "ready"}
        assert (await http.post(CHAT, json=chat())).status_code == 200


async def test_dead_engine(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    engine.die("out of memory")
    response = await http.get("/ready")
    assert response.status_code == 503
    assert "out of memory" in response.json()["reason"]
    error_of(await http.post(CHAT, json=chat()), 503)
    assert engine.state is EngineState.DEAD


async def test_draining(engine: FakeEngineClient) -> None:
    app = make_app(engine)
    async with serving(app) as http:
        app.state.server.draining = True
        assert (await http.get("/ready")).status_code == 503
        assert (await http.get("/live")).status_code == 200
        error_of(await http.post(CHAT, json=chat()), 503)


async def test_a_silent_engine_is_stalled_only_while_requests_are_open(engine: FakeEngineClient) -> None:
    app = make_app(engine, engine_stall_timeout_s=30.0)
    server = app.state.server
    async with serving(app) as http:
        engine.last_message_at = time.monotonic() - 100
        assert (await http.get("/ready")).status_code == 200
        engine.script = lambda request: []
        params = server_request(engine)
        stream = server.submit(params)
        assert (await http.get("/ready")).status_code == 200  # it was idle until just now
        server._busy_since -= 100
        response = await http.get("/ready")
        assert response.status_code == 503
        assert "1 requests open" in response.json()["reason"]
        stream.close()
        assert (await http.get("/ready")).status_code == 200


def server_request(engine: FakeEngineClient):  # type: ignore[no-untyped-def]
    from octavo.scheduler.sampling_params import SamplingParams
    from octavo.server.engine.messages import GenerateRequest

    return GenerateRequest(request_id="r", prompt_token_ids=[1], params=SamplingParams())


@pytest.mark.parametrize(
    ("code", "status", "retries"),
    [
        ("queue_full", 429, True),
        ("internal_error", 500, False),
        ("engine_dead", 503, True),
        ("invalid_request", 400, False),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_failures_before_the_first_output_are_statuses(
    http: httpx.AsyncClient, engine: FakeEngineClient, code: str, status: int, retries: bool, stream: bool
) -> None:
    engine.script = fails(code)
    for url, body in ((CHAT, chat(stream=stream)), ("/v1/completions", {"prompt": ["a", "b"], "stream": stream})):
        response = await http.post(url, json=body)
        error = error_of(response, status)
        assert ("retry-after" in response.headers) == retries
        assert error["code"] == {"queue_full": "rate_limit_exceeded", "invalid_request": None}.get(code, code)
    assert not engine.num_open_requests


@pytest.mark.parametrize("fields", [{"prompt": "a"}, {"prompt": ["a", "b"]}])
async def test_a_failure_in_a_stream_is_its_last_event(
    http: httpx.AsyncClient, engine: FakeEngineClient, fields: dict[str, object]
) -> None:
    engine.script = fails("engine_dead", after="Hel")
    response = await http.post("/v1/completions", json=fields | {"stream": True})
    assert response.status_code == 200
    parsed = events(response.text)
    assert parsed[-1]["error"]["code"] == "engine_dead"
    assert "[DONE]" not in parsed
    assert all(choice["finish_reason"] is None for part in parsed[:-1] for choice in part["choices"])
    assert streamed_texts(parsed)[0] == "Hel"


async def test_a_failure_after_output_is_a_status_without_a_stream(
    http: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    engine.script = fails("engine_dead", after="Hel")
    error_of(await http.post(CHAT, json=chat()), 503)


async def test_an_unexpected_exception_is_a_plain_500(
    engine: FakeEngineClient, caplog: pytest.LogCaptureFixture
) -> None:
    def script(request):  # type: ignore[no-untyped-def]
        raise RuntimeError("CANARY")

    engine.script = script
    async with serving(make_app(engine)) as http:
        response = await http.post(CHAT, json=chat())
    error_of(response, 500)
    assert "CANARY" not in response.text
    assert response.headers["x-request-id"] in caplog.text


async def test_a_broken_stream_ends_with_an_error(
    http: httpx.AsyncClient, engine: FakeEngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CANARY")

    monkeypatch.setattr(ChatChunks, "token_ids", broken)
    response = await http.post(CHAT, json=chat(stream=True))
    parsed = events(response.text)
    assert parsed[-1]["error"]["code"] == "internal_error"
    assert "CANARY" not in response.text
    assert not engine.num_open_requests


async def test_request_ids_are_ours(http: httpx.AsyncClient) -> None:
    ids = set()
    for _ in range(2):
        response = await http.post(CHAT, json=chat(), headers={"X-Request-Id": "mine"})
        ids.add(response.headers["x-request-id"])
    assert len(ids) == 2
    assert all(value.startswith("req_") for value in ids)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("code", [None, "queue_full", "engine_dead", "invalid_request"])
@pytest.mark.parametrize("fields", [{"prompt": "a"}, {"prompt": ["a", "b"]}, {"prompt": [[1], [259]]}])
async def test_every_generation_is_closed(
    engine: FakeEngineClient, fields: dict[str, object], code: str | None, stream: bool
) -> None:
    open_at_submit: list[int] = []

    def script(request):  # type: ignore[no-untyped-def]
        open_at_submit.append(app.state.server.num_open_generations)
        return says("ok")(request) if code is None else fails(code)(request)

    app, engine.script = make_app(engine), script
    async with serving(app) as http:
        await http.post("/v1/completions", json=fields | {"stream": stream})
    assert open_at_submit == list(range(len(engine.requests)))
    assert app.state.server.num_open_generations == 0


@pytest.mark.parametrize("broken", ["Generation.usage", "FirstOutput.of", "EventStream.__init__"])
async def test_a_generation_is_closed_whatever_fails(
    engine: FakeEngineClient, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(f"octavo.server.api.generate.{broken}", fail)
    app = make_app(engine)
    async with serving(app) as http:
        for stream in (False, True):
            await http.post(CHAT, json=chat(stream=stream, stream_options={"include_usage": True} if stream else None))
    assert app.state.server.num_open_generations == 0
    assert not engine.num_open_requests


async def test_a_stream_is_open_until_its_last_event_is_sent(engine: FakeEngineClient) -> None:
    app = make_app(engine)
    server = app.state.server
    async with serving(app):
        stream = server.submit(server_request(engine))
        while not stream.finished:
            await stream.next()
        assert (engine.num_open_requests, server.num_open_generations) == (0, 1)
        for _ in range(2):
            stream.close()
            assert server.num_open_generations == 0


def test_probes_over_the_wire(live: LiveServer) -> None:
    assert httpx.get(f"{live.url}/live").json() == {"status": "ok"}
    assert httpx.get(f"{live.url}/health").status_code == 200


def test_head_of_a_probe_is_get_without_a_body(live: LiveServer, engine: FakeEngineClient) -> None:
    for state in ("ready", "dead"):
        for path in ("/health", "/live", "/ready"):
            full, head = (httpx.request(method, live.url + path) for method in ("GET", "HEAD"))
            assert head.status_code == full.status_code == (503 if state == "dead" and path != "/live" else 200)
            assert head.content == b""
            for name in ("content-length", "content-type", "retry-after"):
                assert head.headers.get(name) == full.headers.get(name)
        engine.from_thread(lambda: engine.die("x"))
        wait_until(lambda: engine.state is EngineState.DEAD)
