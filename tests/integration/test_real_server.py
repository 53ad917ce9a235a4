"""The server as users run it: default model, real process, the stock client."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import httpx
import openai
import pytest

if TYPE_CHECKING:
    from conftest import ServerProcess  # type: ignore[import-not-found]

pytestmark = pytest.mark.real_model

MODEL = "SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_banner_says_what_serves_and_how_long_it_took(server: ServerProcess) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    match = server.wait_for_line(r"ready\s+(\S+) s after the start \(engine: (.*)\)")
    phases = dict(part.rsplit(" ", 1) for part in match[2].split(" · "))
    assert {"imports", "open", "load", "pool", "warm-up"} <= set(phases)
    assert server.wait_for_line(r"curl -N http://127.0.0.1:\d+/v1/chat/completions")


def test_chat_streams_what_it_answers_at_once(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=24)
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_repeated_prompt_is_found_in_the_cache(client: openai.OpenAI) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 30
    counts = []
    for ending in ("one", "two"):
        answer = client.completions.create(model=MODEL, prompt=prompt + ending, max_tokens=1, temperature=0)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        counts.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
    assert counts[0] == 0
    assert counts[1] >= 256


def test_same_seed_same_text_whatever_runs_beside(client: openai.OpenAI) -> None:
    def draw(seed: int) -> str:
        answer = client.completions.create(
            model=MODEL, prompt="My favourite animal is", max_tokens=12, temperature=1.0, seed=seed
        )
        return answer.choices[0].text

    alone = draw(11)
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda seed=seed: results.append(f"{seed}:{draw(seed)}")) for seed in (11, 12, 13)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert f"11:{alone}" in results
    assert len({text.split(":", 1)[1] for text in results}) == 3


def test_parallel_samples_stop_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, n=3, seed=5, max_tokens=12, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content
        for entry in choice.logprobs.content:
            assert len(entry.top_logprobs) == 2
            assert entry.logprob <= entry.top_logprobs[0].logprob + 1e-6
    whole = client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", max_tokens=12, temperature=0)
    text = whole.choices[0].text
    stop = text[4:7]
    cut = client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", max_tokens=12, temperature=0, stop=stop)
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_errors_have_openai_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-17", messages=QUESTION)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="word " * 9000, max_tokens=10)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as invalid:
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=-1)
    assert invalid.value.param == "temperature"


def test_64_streams_run_to_the_end_and_leave_nothing(
    server: ServerProcess, eventually: Callable[[Callable[[], bool], str], None]
) -> None:
    """Every fourth client leaves after its first text."""
    num_streams, max_tokens = 64, 24

    async def one(client: openai.AsyncOpenAI, index: int) -> str:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[
                {"role": "user", "content": f"Tell me {index} things about the number {index}. " * (1 + index % 5)}
            ],
            max_tokens=max_tokens,
            temperature=0.8,
            seed=index,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        reason = None
        async for chunk in stream:
            if index % 4 == 0 and chunk.choices[0].delta.content:
                await stream.close()
                return "left"
            reason = chunk.choices[0].finish_reason or reason
        return reason or "none"

    async def all_of_them() -> list[str]:
        limits = httpx.Limits(max_connections=num_streams)
        async with (
            httpx.AsyncClient(limits=limits, timeout=300) as http,
            openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", http_client=http, max_retries=0) as client,
        ):
            return await asyncio.gather(*(one(client, index) for index in range(num_streams)))

    results = asyncio.run(all_of_them())
    assert results == ["left" if index % 4 == 0 else "length" for index in range(num_streams)]
    eventually(lambda: server.metric("num_requests_running") == 0, "no sequence runs any more")
    eventually(lambda: server.metric("kv_cache_usage_perc") == 0, "all blocks are free")
    assert server.metric("num_requests_waiting") == 0


def test_engine_death_ends_streams_and_a_new_engine_takes_over(
    start_server: Callable[..., ServerProcess], eventually: Callable[[Callable[[], bool], str], None]
) -> None:
    server = start_server()
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    stream = client.completions.create(
        model=MODEL, prompt="Count:", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    killed = server.engine_pid()
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="engine"):
        for _ in stream:
            pass
    eventually(lambda: server.get("/ready")[0] == 200, "another engine serves")
    assert server.engine_pid() != killed
    assert client.completions.create(model=MODEL, prompt="Count:", max_tokens=4).choices[0].text
    assert server.metric("engine_restarts_total") == 1
    assert server.stop() == 0


def test_sigterm_lets_streams_finish(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--shutdown-timeout", "300")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    stream = client.completions.create(
        model=MODEL, prompt="Count:", max_tokens=60, stream=True, extra_body={"ignore_eos": True}
    )
    chunks = iter(stream)
    next(chunks)
    server.popen.send_signal(signal.SIGTERM)
    server.wait_for_line("finishing 1 open requests")
    assert server.get("/ready")[0] == 503
    assert server.get("/live")[0] == 200
    with pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(model=MODEL, prompt="late", max_tokens=1)
    assert refused.value.status_code == 503
    assert refused.value.response.headers["retry-after"].isdigit()
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert server.popen.wait(300) == 0


def test_shutdown_deadline_ends_streams_with_an_error(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server("--shutdown-timeout", "0")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    stream = client.completions.create(
        model=MODEL, prompt="Count:", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    server.popen.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="shutting down"):
        for _ in stream:
            pass
    assert server.popen.wait(60) == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--model", "/nowhere/model.gguf"], 1, r"octavo: .*/nowhere/model.gguf"),
        (["--block-size", "17"], 2, r"octavo: --block-size: expected one of 16, 32, 64"),
        (["--host", "0.0.0.0"], 2, r"octavo: --host 0.0.0.0 .*--api-key"),
        (["--kv-cache-memory", "1KiB"], 1, r"octavo: kv-cache-memory .* give at least"),
        (["--max-model-len", "9000000"], 1, r"octavo: max_model_len 9000000 exceeds the 8192"),
        (["--device", "cuda"], 1, r"octavo: .*cuda"),
    ],
)
def test_a_start_that_fails_says_why_in_one_line(
    start_server: Callable[..., ServerProcess], arguments: list[str], status: int, message: str
) -> None:
    if arguments[0] == "--device":
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    server = start_server(*arguments)
    assert server.popen.wait(120) == status
    server.wait_for_line(message)
    assert "Traceback" not in server.output
    assert len([line for line in server.lines if line.strip()]) <= 2


def test_settings_come_from_environment_and_file(start_server: Callable[..., ServerProcess], tmp_path: object) -> None:
    config = tmp_path / "octavo.yaml"  # type: ignore[operator]
    config.write_text("served-model-name: [small, alias]\nblock_size: 16\nmax-model-len: 1024\n")
    server = start_server("--config", str(config), env={"OCTAVO_BLOCK_SIZE": "64", "OCTAVO_API_KEY": "secret"})
    assert server.wait_for_line(r"blocks of (\d+) tokens")[1] == "64"
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="secret", max_retries=0)
    models = client.models.list().data
    assert [model.id for model in models] == ["small", "alias"]
    assert client.completions.create(model="alias", prompt="Hi", max_tokens=2).model in ("small", "alias")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0).models.list()
    assert re.search(r"limits\s+1024 tokens per sequence", server.output)
