"""POST /v1/completions against a scripted engine."""

from __future__ import annotations

import httpx
import msgspec
import pytest
from http_fakes import READY, FakeEngineClient, error_of, events, fails, make_app, says, serving, streamed_texts

pytestmark = pytest.mark.anyio
URL = "/v1/completions"


async def test_complete_answer(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    body = (await http.post(URL, json={"prompt": "Once"})).json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == "Hello world"
    assert engine.requests[0].params.max_tokens == 16
    assert engine.requests[0].prompt_token_ids == [256, *b"Once"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[256, 97, 98]]),
        (["ab", "c"], [[256, 97, 98], [256, 99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
        ("", [[256]]),
    ],
)
async def test_prompt_forms(
    http: httpx.AsyncClient, engine: FakeEngineClient, prompt: object, expected: list[list[int]]
) -> None:
    body = (await http.post(URL, json={"prompt": prompt, "n": 2})).json()
    assert [request.prompt_token_ids for request in engine.requests] == expected
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(expected)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert body["usage"]["completion_tokens"] == 24 * len(expected)


async def test_stream_of_several_prompts(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    engine.script = lambda request: says(f"to {bytes(request.prompt_token_ids[1:]).decode()}")(request)
    fields = {"prompt": ["x", "y"], "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    parsed = events((await http.post(URL, json=fields)).text)
    assert streamed_texts(parsed) == {0: "to x", 1: "to x", 2: "to y", 3: "to y"}
    assert {part["object"] for part in parsed[:-1]} == {"text_completion"}
    assert parsed[-2]["usage"]["completion_tokens"] == 20
    assert parsed[-1] == "[DONE]"
    assert not engine.num_open_requests


async def test_echo(http: httpx.AsyncClient) -> None:
    for prompt in ("Say: ", list(b"Say: ")):
        body = (await http.post(URL, json={"prompt": prompt, "echo": True})).json()
        assert body["choices"][0]["text"] == "Say: Hello world"
        stream = await http.post(URL, json={"prompt": prompt, "echo": True, "stream": True})
        assert streamed_texts(events(stream.text)) == {0: "Say: Hello world"}


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_are_parallel_arrays(http: httpx.AsyncClient, stream: bool) -> None:
    fields = {"prompt": "x", "logprobs": 2, "max_tokens": 3, "stream": stream}
    response = await http.post(URL, json=fields)
    parts = events(response.text)[:-1] if stream else [response.json()]
    found = [part["choices"][0]["logprobs"] for part in parts if part["choices"][0]["logprobs"]]
    merged = {name: [value for arrays in found for value in arrays[name]] for name in found[0]}
    assert merged == {
        "tokens": ["H", "e", "l"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{token: -0.5, "A": -1.0, "B": -9999.0} for token in "Hel"],
        "text_offset": [0, 1, 2],
    }


async def test_the_default_of_sixteen_gives_way(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    ids = [97] * 510
    assert (await http.post(URL, json={"prompt": ids})).status_code == 200
    assert (await http.post(URL, json={"prompt": "a", "min_tokens": 40})).status_code == 200
    assert [request.params.max_tokens for request in engine.requests] == [2, 40]
    error = error_of(await http.post(URL, json={"prompt": [97] * 512}), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    error = error_of(await http.post(URL, json={"prompt": ids, "max_tokens": 3}), 400)
    assert error["param"] == "max_tokens"


async def test_fan_out_is_bounded(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    """As many samples as may run and wait at once: 8 and 32."""
    for fields in ({"n": 9}, {"n": 2**40}, {"prompt": ["a"] * 21, "n": 2}, {"prompt": ["a"] * 100_000}):
        error_of(await http.post(URL, json={"prompt": "a"} | fields), 400)
    assert not engine.requests
    assert (await http.post(URL, json={"prompt": ["a"] * 20, "n": 2})).status_code == 200


async def test_without_a_queue_what_can_run_is_served(engine: FakeEngineClient) -> None:
    async with serving(make_app(engine)) as http:
        engine.handle(msgspec.structs.replace(READY, max_num_waiting=0))
        assert (await http.post(URL, json={"prompt": "a"})).status_code == 200
        assert (await http.post(URL, json={"prompt": ["a"] * 4, "n": 2})).status_code == 200
        assert error_of(await http.post(URL, json={"prompt": ["a"] * 9}), 400)["param"] == "prompt"
        assert error_of(await http.post(URL, json={"prompt": "a", "n": 9}), 400)["param"] == "n"


async def test_one_bad_prompt_refuses_all(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    error = error_of(await http.post(URL, json={"prompt": [[1], [259]]}), 400)
    assert error["param"] == "prompt"
    assert [abort.request_id for abort in engine.aborts] == [request.request_id for request in engine.requests]
    assert not engine.num_open_requests


async def test_one_prompt_without_room_refuses_all(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    def script(request):  # type: ignore[no-untyped-def]
        return fails("queue_full")(request) if request.request_id.endswith("-2") else []

    engine.script = script
    error_of(await http.post(URL, json={"prompt": ["a", "b", "c"]}), 429)
    assert {abort.request_id[-2:] for abort in engine.aborts} == {"-0", "-1"}
    assert not engine.num_open_requests


async def test_token_ids_are_returned_when_asked_for(http: httpx.AsyncClient) -> None:
    fields = {"prompt": [[1], [2]], "max_tokens": 2, "return_token_ids": True}
    choices = (await http.post(URL, json=fields)).json()["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [[1], [2]]
    assert [choice["token_ids"] for choice in choices] == [list(b"He")] * 2
    parsed = events((await http.post(URL, json=fields | {"stream": True})).text)[:-1]
    assert [part["choices"][0]["prompt_token_ids"] for part in parsed[:2]] == [[1], [2]]
