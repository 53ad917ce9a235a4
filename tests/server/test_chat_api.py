"""POST /v1/chat/completions against a scripted engine."""

from __future__ import annotations

import httpx
import pytest
from http_fakes import EOS, FakeEngineClient, chat, error_of, events, make_app, says, serving, streamed_texts
from octavo.server.chat_template import ChatTemplate

pytestmark = pytest.mark.anyio
URL = "/v1/chat/completions"


async def test_complete_answer(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    engine.script = says("Hello world", cached=16)
    response = await http.post(URL, json=chat(model="alias", seed=7, temperature=0, max_completion_tokens=50))
    body = response.json()
    assert response.status_code == 200
    assert body["id"].startswith("chatcmpl-")
    assert response.headers["x-request-id"] == "req_" + body["id"].removeprefix("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "fake"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello world", "refusal": None}
    assert choice["finish_reason"] == "stop"
    prompt = "[user]hi[assistant]"
    assert engine.requests[0].prompt_token_ids == [256, *prompt.encode()]
    assert body["usage"] == {
        "prompt_tokens": len(prompt) + 1,
        "completion_tokens": 12,
        "total_tokens": len(prompt) + 13,
        "prompt_tokens_details": {"cached_tokens": 16},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    params = engine.requests[0].params
    assert (params.seed, params.temperature, params.max_tokens) == (7, 0, 50)
    assert not engine.num_open_requests


async def test_defaults_go_to_the_context_limit(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    await http.post(URL, json=chat(temperature=None, stop=None, stream=None, user=None))
    assert engine.requests[0].params.max_tokens is None


async def test_stream_has_role_deltas_finish_and_done(http: httpx.AsyncClient) -> None:
    response = await http.post(URL, json=chat(stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    parsed = events(response.text)
    assert parsed[-1] == "[DONE]"
    chunks = parsed[:-1]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert streamed_texts(parsed) == {0: "Hello world"}
    assert all("usage" not in chunk for chunk in chunks)


async def test_stream_usage_comes_last_and_is_null_before(http: httpx.AsyncClient) -> None:
    response = await http.post(URL, json=chat(stream=True, stream_options={"include_usage": True}))
    *chunks, last, done = events(response.text)
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12
    assert last["usage"] == (await http.post(URL, json=chat())).json()["usage"]


async def test_continuous_usage_counts_up(http: httpx.AsyncClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    response = await http.post(URL, json=chat(stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in events(response.text)[:-1]]
    assert counts == sorted(counts)
    assert counts[-1] == 12


async def test_many_tokens_per_wakeup_are_one_chunk(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    engine.script = says("Hello world", per_step=100)
    parsed = events((await http.post(URL, json=chat(stream=True))).text)
    assert len(parsed) == 4  # role, content, finish, [DONE]
    assert streamed_texts(parsed) == {0: "Hello world"}


async def test_characters_are_not_split(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    text = "naïve 🎈 \u2028 日本"
    engine.script = says(text)
    response = await http.post(URL, json=chat(stream=True))
    assert "\\ufffd" not in response.text
    assert response.text.isascii()
    assert streamed_texts(events(response.text)) == {0: text}


async def test_several_samples_are_told_apart_by_index(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    body = (await http.post(URL, json=chat(n=3))).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 36
    parsed = events((await http.post(URL, json=chat(n=3, stream=True))).text)
    assert streamed_texts(parsed) == dict.fromkeys(range(3), "Hello world")
    finishes = [c["index"] for part in parsed[:-1] for c in part["choices"] if c["finish_reason"]]
    assert sorted(finishes) == [0, 1, 2]
    assert engine.requests[0].params.n == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(http: httpx.AsyncClient, stream: bool) -> None:
    response = await http.post(URL, json=chat(logprobs=True, top_logprobs=2, max_tokens=2, stream=stream))
    if stream:
        choices = [part["choices"][0] for part in events(response.text)[:-1]]
        content = [entry for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
    else:
        content = response.json()["choices"][0]["logprobs"]["content"]
    assert content[0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "A", "logprob": -1.0, "bytes": [65]},
            {"token": "B", "logprob": -9999.0, "bytes": [66]},
        ],
    }
    assert len(content) == 2


async def test_logprobs_without_alternatives(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    body = (await http.post(URL, json=chat(logprobs=True))).json()
    assert engine.requests[0].params.logprobs == 0
    assert body["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["o w", ["zzz", "o w"]])
async def test_stop_string_ends_and_aborts(
    http: httpx.AsyncClient, engine: FakeEngineClient, stream: bool, stop: str | list[str]
) -> None:
    response = await http.post(URL, json=chat(stop=stop, stream=stream))
    if stream:
        parsed = events(response.text)
        assert streamed_texts(parsed) == {0: "Hell"}
        finish = parsed[-2]["choices"][0]
    else:
        finish = response.json()["choices"][0]
        assert finish["message"]["content"] == "Hell"
        assert response.json()["usage"]["completion_tokens"] == 7
    assert (finish["finish_reason"], finish["stop_reason"]) == ("stop", "o w")
    assert engine.aborts[0].sample_index == 0
    assert not engine.num_open_requests


async def test_a_stop_string_in_one_sample_leaves_the_others(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    def script(request):  # type: ignore[no-untyped-def]
        first = says("one STOP two")(request)
        second = says("one two")(request)
        pairs = zip(first, [*second, *[[]] * 10], strict=False)
        return [[*a[:1], *b[1:]] for a, b in pairs]

    engine.script = script
    body = (await http.post(URL, json=chat(n=2, stop="STOP"))).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["one ", "one two"]
    assert [choice["stop_reason"] for choice in body["choices"]] == ["STOP", None]


async def test_stop_token_is_hidden_or_shown(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    fields = {"skip_special_tokens": False, "stop_token_ids": [EOS]}
    hidden = (await http.post(URL, json=chat(**fields))).json()["choices"][0]
    assert (hidden["message"]["content"], hidden["stop_reason"]) == ("Hello world", EOS)
    shown = (await http.post(URL, json=chat(**fields, include_stop_str_in_output=True))).json()["choices"][0]
    assert shown["message"]["content"] == "Hello world</s>"


async def test_extensions_reach_the_engine(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    fields = {
        "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5, "min_tokens": 2, "ignore_eos": True,
        "stop_token_ids": [3], "presence_penalty": 1, "frequency_penalty": -1, "top_p": 0.5,
        "logit_bias": {"7": -100, "8": 1.5}, "skip_special_tokens": False,
    }  # fmt: skip
    response = await http.post(URL, json=chat(**fields, priority=-3, cache_salt="salt", max_tokens=9))
    assert response.status_code == 200
    assert "x-ignored-params" not in response.headers
    request = engine.requests[0]
    for name, value in fields.items():
        expected = {"stop_token_ids": (3,), "logit_bias": {7: -100, 8: 1.5}}.get(name, value)
        assert getattr(request.params, name) == expected, name
    assert (request.priority, request.cache_salt) == (-3, "salt")


async def test_ignored_parameters_are_named(http: httpx.AsyncClient) -> None:
    fields = {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "parallel_tool_calls": True}
    response = await http.post(URL, json=chat(**fields, chat_template_kwargs={"thinking": True}))
    assert response.status_code == 200
    named = response.headers["x-ignored-params"].split(", ")
    assert sorted(named) == sorted([*fields, "chat_template_kwargs.thinking"])


async def test_template_arguments_act(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    kwargs = {"enable_thinking": True}
    response = await http.post(URL, json=chat(chat_template_kwargs=kwargs, add_generation_prompt=False))
    assert "x-ignored-params" not in response.headers
    assert bytes(engine.requests[0].prompt_token_ids[1:]) == b"[user]hi<think>"


async def test_message_forms(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "bob"},
        {"role": "assistant", "content": None, "refusal": None,
         "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]  # fmt: skip
    assert (await http.post(URL, json={"messages": messages})).status_code == 200
    prompt = bytes(engine.requests[0].prompt_token_ids[1:])
    assert prompt == b"[system]be kind[user]ab[assistant][tool]42[assistant]"


async def test_token_ids_are_returned_when_asked_for(http: httpx.AsyncClient) -> None:
    body = (await http.post(URL, json=chat(return_token_ids=True, max_tokens=2))).json()
    assert body["choices"][0]["token_ids"] == list(b"He")
    assert body["prompt_token_ids"][:2] == [256, ord("[")]
    response = await http.post(URL, json=chat(return_token_ids=True, max_tokens=2, stream=True))
    parsed = events(response.text)[:-1]
    assert parsed[0]["prompt_token_ids"] == body["prompt_token_ids"]
    ids = [part["choices"][0].get("token_ids", []) for part in parsed]
    assert [token for part in ids for token in part] == list(b"He")


async def test_generation_defaults_apply_where_nothing_is_asked(engine: FakeEngineClient) -> None:
    defaults = {"temperature": 0.6, "top_p": 0.9, "top_k": 20.0, "repetition_penalty": 1.1, "min_p": 0.05}
    async with serving(make_app(engine, defaults=defaults)) as http:
        await http.post(URL, json=chat())
        await http.post(URL, json=chat(temperature=0, top_p=1, top_k=-1, repetition_penalty=1, min_p=0))
    first, second = (request.params for request in engine.requests)
    assert [getattr(first, name) for name in defaults] == list(defaults.values())
    assert isinstance(first.top_k, int)
    assert [getattr(second, name) for name in defaults] == [0, 1, -1, 1, 0]


async def test_exact_context_limit(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    frame = len("[user][assistant]") + 1
    for room, status in ((1, 200), (0, 400), (-1, 400)):
        content = "x" * (512 - frame - room)
        response = await http.post(URL, json={"messages": [{"role": "user", "content": content}]})
        assert response.status_code == status, room
    error = error_of(response, 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "513" in error["message"]
    assert "512" in error["message"]


async def test_model_without_template(engine: FakeEngineClient) -> None:
    app = make_app(engine)
    app.state.server.chat_template = ChatTemplate(None, None, None)
    async with serving(app) as http:
        assert error_of(await http.post(URL, json=chat()), 400)["param"] == "messages"


async def test_tool_arguments_with_a_lone_surrogate_stay_text(http: httpx.AsyncClient) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "user", "content": "x"}]
    assert (await http.post(URL, json={"messages": messages})).status_code == 200
