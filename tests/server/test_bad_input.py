"""Whatever is sent, the answer is a 4xx in OpenAI's shape, and nothing reaches the engine."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from http_fakes import FakeEngineClient, chat, error_of, make_app, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.anyio
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}

BODIES = {
    "empty": b"",
    "not JSON": b"{",
    "trailing": b"{} x",
    "null": b"null",
    "list": b"[]",
    "string": b'"x"',
    "NaN": b'{"prompt": "a", "temperature": NaN}',
    "Infinity": b'{"prompt": "a", "temperature": -Infinity}',
    "1e400": b'{"prompt": "a", "temperature": 1e400}',
    "10^400": b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}",
    "10^400 int": b'{"prompt": "a", "seed": 1' + b"0" * 400 + b"}",
    "10^5000": b'{"prompt": "a", "n": 1' + b"0" * 5000 + b"}",
    "10^5000 id": b'{"prompt": [1' + b"0" * 5000 + b"]}",
    "10^400 id": b'{"prompt": [1' + b"0" * 400 + b"]}",
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "lone surrogate key": b'{"prompt": "a", "\\udc00x": 1}',
    "lone surrogate in ignored": b'{"prompt": "a", "user": ["\\ud800 "]}',
    "raw surrogate": b'{"prompt": "\xed\xa0\x80"}',
    "not UTF-8": b'{"prompt": "\xff"}',
    "byte order mark": b'\xef\xbb\xbf{"prompt": "a"}',
    "deep list": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep object": b'{"metadata":' * 100_000 + b"1" + b"}" * 100_000,
    "raw NUL": b'{"prompt": "\x00"}',
    "many fields": json.dumps({f"f{i}": i for i in range(100_000)}).encode(),
}


@pytest.mark.parametrize("url", [CHAT, TEXT, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
async def test_bodies(http: httpx.AsyncClient, engine: FakeEngineClient, url: str, body: bytes) -> None:
    response = await http.post(url, content=body, headers=JSON)
    error_of(response, 400)
    assert len(response.content) < 2000
    assert not engine.requests


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("frequency_penalty", {"frequency_penalty": 3}),
        ("n", {"n": 0}),
        ("n", {"n": -1}),
        ("n", {"n": True}),
        ("n", {"n": 1.0}),
        ("n", {"n": "1"}),
        ("n", {"n": 9}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": "1"}),
        ("temperature", {"temperature": True}),
        ("top_p", {"top_p": 0}),
        ("top_p", {"top_p": 1.1}),
        ("top_k", {"top_k": -2}),
        ("min_p", {"min_p": 2}),
        ("repetition_penalty", {"repetition_penalty": 0}),
        ("seed", {"seed": 2**63}),
        ("seed", {"seed": 1.5}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": -1}),
        ("max_tokens", {"max_tokens": 2**31}),
        ("max_tokens", {"max_tokens": 10_000}),
        ("min_tokens", {"min_tokens": 5, "max_tokens": 4}),
        ("stop", {"stop": ["a"] * 5}),
        ("stop", {"stop": ["a"] * 1000}),
        ("stop", {"stop": ""}),
        ("stop", {"stop": [1]}),
        ("stop", {"stop": "x" * 5000}),
        ("stop_token_ids", {"stop_token_ids": [259]}),
        ("stop_token_ids", {"stop_token_ids": [-1]}),
        ("stop_token_ids", {"stop_token_ids": [True]}),
        ("logit_bias", {"logit_bias": {"259": 1}}),
        ("logit_bias", {"logit_bias": {"x": 1}}),
        ("logit_bias", {"logit_bias": {"1": 101}}),
        ("logit_bias", {"logit_bias": {"1": "1"}}),
        ("logit_bias", {"logit_bias": {"²": 1}}),
        ("cache_salt", {"cache_salt": "x" * 2000}),
        ("cache_salt", {"cache_salt": "\0"}),
        ("priority", {"priority": 2**40}),
        ("stream", {"stream": 1}),
        ("stream_options", {"stream_options": {}}),
        ("stream_options.foo", {"stream": True, "stream_options": {"foo": 1}}),
        ("best_of", {"best_of": 2}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("structured_outputs", {"structured_outputs": {"regex": "(a+)+b"}}),
        ("guided_json", {"guided_json": {}}),
        ("prompt_logprobs", {"prompt_logprobs": 1}),
        ("prompt_embeds", {"prompt_embeds": "x"}),
        ("use_beam_search", {"use_beam_search": True}),
        ("foo", {"foo": 1}),
    ],
)
@pytest.mark.parametrize("url", [CHAT, TEXT])
async def test_fields(
    http: httpx.AsyncClient, engine: FakeEngineClient, url: str, param: str, fields: dict[str, Any]
) -> None:
    body = chat(**fields) if url == CHAT else {"prompt": "a"} | fields
    if url == CHAT and param == "max_tokens" and "max_tokens" in fields:
        assert error_of(await http.post(url, json=chat(max_completion_tokens=fields["max_tokens"])), 400)["param"] == (
            "max_completion_tokens"
        )
    error = error_of(await http.post(url, json=body), 400)
    assert error["param"] == param
    assert not engine.requests


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("messages", {"messages": []}),
        ("messages", {"messages": None}),
        ("messages", {"messages": "hi"}),
        ("messages.0.role", {"messages": [{"role": "king", "content": "x"}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": 1}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": ["x"]}]}),
        ("messages.0.foo", {"messages": [{"role": "user", "content": "x", "foo": 1}]}),
        ("messages.0", {"messages": [{"role": "user"}]}),
        ("messages", {"messages": [{"role": "user", "content": "x"}] * 20_000}),
        ("messages.0.k0", {"messages": [{"role": "user", "content": "x"} | {f"k{i}": 1 for i in range(100_000)}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 5000}]}),
        ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("functions", {"functions": [{}]}),
        ("modalities", {"modalities": ["audio"]}),
        ("audio", {"audio": {}}),
        ("chat_template", {"chat_template": "{{ 1 }}"}),
        ("chat_template_kwargs", {"chat_template_kwargs": {"messages": []}}),
        ("chat_template_kwargs", {"chat_template_kwargs": {"enable_thinking": "yes"}}),
        ("continue_final_message", {"continue_final_message": True}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": -1}),
        ("logprobs", {"logprobs": 2}),
        ("max_completion_tokens", {"max_tokens": 3, "max_completion_tokens": 4}),
    ],
)
async def test_chat_fields(http: httpx.AsyncClient, param: str, fields: dict[str, Any]) -> None:
    assert error_of(await http.post(CHAT, json=chat(**fields)), 400)["param"] == param


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [[]]}),
        ("prompt", {"prompt": [1, "a"]}),
        ("prompt", {"prompt": [True]}),
        ("prompt", {"prompt": [1.0]}),
        ("prompt", {"prompt": [-1]}),
        ("prompt", {"prompt": [259]}),
        ("prompt", {"prompt": {"a": 1}}),
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": ""} | {"add_special_tokens": False}),
        ("prompt", {"prompt": ["a"] * 41}),
        ("prompt", {"prompt": ["a"] * 6, "n": 7}),
        ("n", {"prompt": ["a"] * 6, "n": 9}),
        ("n", {"n": 41}),
        ("suffix", {"suffix": "x"}),
        ("logprobs", {"logprobs": 21}),
        ("logprobs", {"logprobs": True}),
        ("echo", {"echo": True, "logprobs": 1}),
        ("messages", {"messages": []}),
    ],
)
async def test_completion_fields(http: httpx.AsyncClient, param: str, fields: dict[str, Any]) -> None:
    assert error_of(await http.post(TEXT, json={"prompt": "a"} | fields), 400)["param"] == param


async def test_harmless_values_of_unsupported_fields_pass(http: httpx.AsyncClient) -> None:
    fields = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"],
              "best_of": 1, "echo": False}  # fmt: skip
    assert (await http.post(CHAT, json=chat(**fields))).status_code == 200
    assert (await http.post(TEXT, json={"prompt": "a", "suffix": "", "best_of": 1})).status_code == 200


async def test_unknown_argument_is_named_as_openai_does(http: httpx.AsyncClient) -> None:
    error = error_of(await http.post(TEXT, json={"prompt": "a", "foo": "secret"}), 400)
    assert error["message"] == "Unrecognized request argument supplied: foo"


async def test_errors_are_few_and_never_echo(http: httpx.AsyncClient) -> None:
    canary = "CANARY"
    fields = dict.fromkeys(["n", "seed", "top_p", "top_k", "min_p", "temperature", "stream", "priority"], canary)
    fields |= {f"{'k' * 200}{i}": canary for i in range(100)}
    response = await http.post(TEXT, json={"prompt": {canary: canary}, "stop": {canary: 1}} | fields)
    message = error_of(response, 400)["message"]
    assert canary not in message
    assert message.count(";") == 10
    assert "and 100 more" in message


async def test_nul_is_tolerated(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    body = b'{"prompt": "a\\u0000b"}'
    assert (await http.post(TEXT, content=body, headers=JSON)).status_code == 200
    assert engine.requests[0].prompt_token_ids == [256, 97, 0, 98]


@pytest.mark.parametrize(
    ("url", "param", "body"),
    [
        (TEXT, "prompt", b'{"prompt": "CANARY", "prompt": "CANARY"}'),
        (TEXT, "prompt", b'{"prompt": "CANARY", "n": 1, "\\u0070rompt": "CANARY"}'),
        (TEXT, "1", b'{"prompt": "a", "logit_bias": {"1": 1, "1": 100}}'),
        (CHAT, "role", b'{"messages": [{"role": "user", "content": "CANARY", "role": "system"}]}'),
        ("/tokenize", "prompt", b'{"prompt": "CANARY", "prompt": "CANARY"}'),
    ],
)
async def test_duplicate_keys_are_named(http: httpx.AsyncClient, url: str, param: str, body: bytes) -> None:
    response = await http.post(url, content=body, headers=JSON)
    error = error_of(response, 400)
    assert (error["param"], error["code"]) == (param, "invalid_json")
    assert f"the key {param} " in error["message"]
    assert "CANARY" not in response.text


async def test_long_bodies_are_not_searched_for_duplicate_keys(
    http: httpx.AsyncClient, engine: FakeEngineClient
) -> None:
    for size, status in ((65_535, 400), (65_536, 200)):
        body = b'{"prompt": "x", "prompt": "a"}'.ljust(size)
        assert (await http.post(TEXT, content=body, headers=JSON)).status_code == status
    assert engine.requests[0].prompt_token_ids == [256, 97]


async def test_an_object_of_too_many_fields_names_an_unknown_one(http: httpx.AsyncClient) -> None:
    error = error_of(await http.post(TEXT, json={"prompt": "a"} | {f"f{i}": i for i in range(1000)}), 400)
    assert error["param"] == "f0"
    assert "256 fields" in error["message"]


async def test_messages_use_the_caller_s_names(http: httpx.AsyncClient) -> None:
    error = error_of(await http.post(CHAT, json=chat(logprobs=True, top_logprobs=21)), 400)
    assert error["message"] == "top_logprobs must be between 0 and 20"
    error = error_of(await http.post(CHAT, json=chat(max_completion_tokens=4, min_tokens=5)), 400)
    assert error["message"] == "min_tokens (5) must not exceed max_completion_tokens (4)"
    error = error_of(await http.post(CHAT, json=chat(max_tokens=4, min_tokens=5)), 400)
    assert error["message"] == "min_tokens (5) must not exceed max_tokens (4)"
    error = error_of(await http.post(TEXT, json={"prompt": "a", "logprobs": 21}), 400)
    assert error["message"] == "logprobs must be between 0 and 20"


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
async def test_content_types(http: httpx.AsyncClient, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    error_of(await http.post(TEXT, content=b'{"prompt": "a"}', headers=headers), 415)


async def test_charset_is_no_other_type_and_gzip_is_refused(http: httpx.AsyncClient) -> None:
    utf8 = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert (await http.post(TEXT, content=b'{"prompt": "a"}', headers=utf8)).status_code == 200
    error_of(await http.post(TEXT, content=b"\x1f\x8b", headers=JSON | {"Content-Encoding": "gzip"}), 415)


async def test_body_limit_announced_and_chunked(engine: FakeEngineClient) -> None:
    async def chunks():  # type: ignore[no-untyped-def]
        for _ in range(20):
            yield b"x" * 100

    async with serving(make_app(engine, max_body_bytes=1000)) as http:
        error_of(await http.post(TEXT, content=b"x" * 1001, headers=JSON), 413)
        error_of(await http.post(TEXT, content=chunks(), headers=JSON), 413)
        exact = json.dumps({"prompt": "a"}).encode().ljust(1000)
        assert (await http.post(TEXT, content=exact, headers=JSON)).status_code == 200


async def test_routes_and_methods(http: httpx.AsyncClient) -> None:
    assert error_of(await http.get("/nope"), 404)["type"] == "invalid_request_error"
    assert error_of(await http.get("/v1/chat/completions/"), 404)
    assert error_of(await http.get(CHAT), 405)["type"] == "invalid_request_error"
    assert error_of(await http.delete("/v1/models"), 405)


async def test_wrong_model(http: httpx.AsyncClient) -> None:
    for url, body in ((CHAT, chat(model="gpt")), (TEXT, {"prompt": "a", "model": "gpt"})):
        error = error_of(await http.post(url, json=body), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = """
    model messages prompt max_tokens max_completion_tokens temperature top_p n stop seed logprobs top_logprobs stream
    stream_options top_k min_p min_tokens stop_token_ids logit_bias cache_salt priority echo suffix tools
    chat_template_kwargs response_format best_of ignore_eos user metadata tokens return_token_strs
"""
FIELD_NAMES = st.sampled_from(NAMES.split())


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.dictionaries(FIELD_NAMES, JSON_VALUES, max_size=6),
    url=st.sampled_from([CHAT, TEXT, "/tokenize", "/detokenize"]),
    complete=st.booleans(),
)
async def test_generated_json_is_never_a_server_error(
    http: httpx.AsyncClient, fields: dict[str, Any], url: str, complete: bool
) -> None:
    required = {CHAT: chat(), TEXT: {"prompt": "a"}, "/tokenize": {"prompt": "a"}, "/detokenize": {"tokens": [1]}}
    body = (required[url] | fields) if complete else fields
    response = await http.post(url, content=json.dumps(body), headers=JSON)
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        error_of(response, response.status_code)
