"""The real openai client against a real uvicorn server."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from http_fakes import READY, FakeEngineClient, LiveServer, fails, says, wait_until

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=20) as api:
        yield api


def test_chat(client: openai.OpenAI, engine: FakeEngineClient) -> None:
    engine.script = says("Hello wörld", cached=4)
    answer = client.chat.completions.create(model="fake", messages=MESSAGES, seed=5, temperature=0, user="me")
    assert answer.choices[0].message.content == "Hello wörld"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 13
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert answer._request_id == "req_" + answer.id.removeprefix("chatcmpl-")
    assert engine.requests[0].params.seed == 5


def test_chat_stream(client: openai.OpenAI, engine: FakeEngineClient) -> None:
    engine.script = says("Hello wörld 🎈")
    stream = client.chat.completions.create(
        model="fake", messages=MESSAGES, stream=True, n=2, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    texts = {0: "", 1: ""}
    roles = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role or ""
    assert texts == dict.fromkeys((0, 1), "Hello wörld 🎈")
    assert roles == dict.fromkeys((0, 1), "assistant")
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2 * 18
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_chat_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="fake", messages=MESSAGES, logprobs=True, top_logprobs=1) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Hello world"
    assert final.choices[0].logprobs is not None
    assert final.choices[0].logprobs.content is not None
    assert len(final.choices[0].logprobs.content) == 12


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt=["a", "b"], n=2, logprobs=1, extra_body={"top_k": 3})
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens is not None
    assert "".join(answer.choices[0].logprobs.tokens).startswith("Hello")
    chunks = list(client.completions.create(model="fake", prompt="a", stream=True, stop="o w"))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hell"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake", "alias"]
    assert client.models.retrieve("alias").id == "alias"


def test_errors_become_the_right_exceptions(client: openai.OpenAI, engine: FakeEngineClient) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        client.chat.completions.create(model="fake", messages=MESSAGES, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    for code, kind in (("queue_full", openai.RateLimitError), ("internal_error", openai.InternalServerError)):
        engine.script = fails(code)
        for stream in (False, True):
            with pytest.raises(kind, match=f"scripted {code}"):
                client.chat.completions.create(model="fake", messages=MESSAGES, stream=stream)  # type: ignore[call-overload]


def test_the_client_retries_when_told_to(live: LiveServer, engine: FakeEngineClient) -> None:
    def once_busy(request):  # type: ignore[no-untyped-def]
        return (fails("queue_full") if len(engine.requests) == 1 else says("ok"))(request)

    engine.script = once_busy
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=1) as api:
        answer = api.chat.completions.create(model="fake", messages=MESSAGES)
    assert answer.choices[0].message.content == "ok"
    assert len(engine.requests) == 2


def test_wrong_key() -> None:
    with (
        LiveServer(FakeEngineClient(), api_keys=("right",)) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0) as api,
    ):
        with pytest.raises(openai.AuthenticationError) as refused:
            api.models.list()
        assert refused.value.code == "invalid_api_key"
        assert api.with_options(api_key="right").models.list().data


def test_engine_death_in_a_stream(client: openai.OpenAI, live: LiveServer, engine: FakeEngineClient) -> None:
    engine.script = says("Hel", finish=False, with_eos=False)
    received = ""
    stream = client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
    iterator = iter(stream)
    while received != "Hel":
        received += next(iterator).choices[0].delta.content or ""
    engine.from_thread(lambda: engine.die("killed"))
    with pytest.raises(openai.APIError, match="killed"):
        list(iterator)
    with pytest.raises(openai.InternalServerError) as down:
        client.chat.completions.create(model="fake", messages=MESSAGES)
    assert down.value.status_code == 503
    engine.from_thread(lambda: engine.handle(READY))
    wait_until(lambda: engine.dead_reason and engine.state.value == "ready")
    engine.script = says("back")
    answer = client.chat.completions.create(model="fake", messages=MESSAGES)
    assert answer.choices[0].message.content == "back"


def test_engine_death_without_a_stream(live: LiveServer, engine: FakeEngineClient) -> None:
    import threading

    engine.script = lambda request: []
    results: list[Exception] = []

    def call() -> None:
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as api:
            try:
                api.chat.completions.create(model="fake", messages=MESSAGES)
            except openai.APIStatusError as error:
                results.append(error)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    wait_until(lambda: len(engine.requests) == 4)
    engine.from_thread(lambda: engine.die("killed"))
    for caller in callers:
        caller.join(20)
    assert [getattr(error, "status_code", None) for error in results] == [503] * 4
    assert all(int(error.response.headers["retry-after"]) >= 1 for error in results)  # type: ignore[attr-defined]
