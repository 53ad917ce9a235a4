"""A scripted engine and a byte-level tokenizer: HTTP is tested without a model."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import tokenizers
import uvicorn
from fastapi import FastAPI
from octavo.model.config import ModelConfig
from octavo.scheduler.batch import TokenLogprobs
from octavo.server.app import create_app
from octavo.server.config import EngineConfig, ServerConfig
from octavo.server.engine.client import EngineClient
from octavo.server.engine.messages import (
    Abort,
    DownMessage,
    EngineDead,
    EngineReady,
    GenerateRequest,
    RequestError,
    RequestTimings,
    StepOutput,
    StepStats,
    TokenOutput,
)
from octavo.server.tokenizer import _GPT2_BYTES, Tokenizer

BOS, EOS, SPECIAL = 256, 257, 258
DEADLINE_S = 20.0
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{% if enable_thinking %}<think>{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """One token per UTF-8 byte, whose id it is, and three special ones."""
    vocab = dict(_GPT2_BYTES)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<special>"])
    return Tokenizer(backend, bos_token_id=BOS, eos_token_ids=(EOS,), add_bos=True, chat_template=TEMPLATE)


TOKENIZER = byte_tokenizer()

READY = EngineReady(
    max_model_len=512,
    max_num_seqs=8,
    max_num_waiting=32,
    max_num_batched_tokens=256,
    block_size=16,
    num_blocks=100,
    pool_blocks=[100],
    kv_cache_bytes=1000,
    weight_bytes=1000,
    vocab_size=259,
    eos_token_ids=[EOS],
    prefix_caching=True,
    architecture="Fake",
    dtype="float32",
    device="cpu",
    backend="reference",
    phases={},
)

Script = Callable[[GenerateRequest], list[list[TokenOutput]]]


def says(
    text: str | bytes, *, cached: int = 0, per_step: int = 1, finish: bool = True, with_eos: bool = True
) -> Script:
    """A script that answers every sample with `text`, then eos, `per_step` tokens at a time, up to max_tokens."""
    data = text.encode() if isinstance(text, str) else text

    def script(request: GenerateRequest) -> list[list[TokenOutput]]:
        ids = [*data, EOS] if with_eos else list(data)
        limit = request.params.max_tokens
        stopped = with_eos and (limit is None or len(ids) <= limit)
        ids = ids[:limit]
        steps: list[list[TokenOutput]] = []
        for start in range(0, len(ids), per_step):
            new = ids[start : start + per_step]
            last = start + per_step >= len(ids) and finish
            logprobs = None
            if request.params.logprobs is not None:
                logprobs = [fake_logprobs(token_id, request.params.logprobs) for token_id in new]
            steps.append(
                [
                    TokenOutput(
                        request_id=request.request_id,
                        sample_index=sample,
                        token_ids=new,
                        logprobs=logprobs,
                        finish_reason=("stop" if stopped else "length") if last else None,
                        stop_token_id=EOS if last and stopped else None,
                        num_cached_tokens=cached,
                        timings=TIMINGS if last else FIRST_TIMINGS if start == 0 else None,
                    )
                    for sample in range(request.params.n)
                ]
            )
        return steps

    return script


FIRST_TIMINGS = RequestTimings(arrival=1.0, scheduled=2.0, first_token=4.0, last_token=4.0)
TIMINGS = RequestTimings(arrival=1.0, scheduled=2.0, first_token=4.0, last_token=8.0)


def fake_logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    """The drawn token at −0.5, then A, B, C … at −1, −2 …, the last of them at −inf."""
    top = [65 + rank for rank in range(num_top)]
    values = [-1.0 - rank for rank in range(num_top)]
    if values:
        values[-1] = float("-inf")
    return TokenLogprobs([token_id, *top], [-0.5, *values])


def fails(code: str, after: str = "") -> Script:
    """A script that produces `after` and then an error."""

    def script(request: GenerateRequest) -> list[list[TokenOutput]]:
        error = RequestError(code=code, message=f"scripted {code}")  # type: ignore[arg-type]
        failed = TokenOutput(request_id=request.request_id, finish_reason="error", error=error)
        begun = says(after, finish=False, with_eos=False)(request) if after else []
        return [*begun, [failed]]

    return script


class FakeEngineClient(EngineClient):
    """Plays a script per request, one step per turn of the event loop; records what it was sent."""

    def __init__(self, script: Script | None = None, *, ready: bool = True) -> None:
        super().__init__()
        self.script: Script = script or says("Hello world")
        self.requests: list[GenerateRequest] = []
        self.aborts: list[Abort] = []
        self.loop: asyncio.AbstractEventLoop | None = None
        self._ready_at_start = ready
        self._aborted: set[tuple[str, int | None]] = set()

    async def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        if self._ready_at_start:
            self.handle(READY)

    async def close(self) -> None:
        self.die("closed")

    def die(self, reason: str) -> None:
        self.handle(EngineDead(reason))

    def from_thread(self, function: Callable[[], Any]) -> None:
        """Run on the server's loop."""
        assert self.loop is not None
        self.loop.call_soon_threadsafe(function)

    def _send(self, message: DownMessage) -> None:
        if isinstance(message, GenerateRequest):
            self.requests.append(message)
            self._play(message, self.script(message))
        elif isinstance(message, Abort):
            self.aborts.append(message)
            self._aborted.add((message.request_id, message.sample_index))

    def _play(self, request: GenerateRequest, steps: list[list[TokenOutput]]) -> None:
        if not steps or (request.request_id, None) in self._aborted:
            return
        assert self.loop is not None
        self.loop.call_soon(self._step, request, steps)

    def _step(self, request: GenerateRequest, steps: list[list[TokenOutput]]) -> None:
        outputs = [out for out in steps[0] if (out.request_id, out.sample_index) not in self._aborted]
        num_new = sum(len(out.token_ids) for out in outputs)
        stats = StepStats(
            num_running=1,
            num_blocks=100,
            num_free_blocks=60,
            block_usage=0.4,
            num_cached_blocks=20,
            num_shared_blocks=10,
            num_scheduled_tokens=num_new,
            num_generation_tokens=num_new,
            forward_seconds=0.25,
        )
        self.handle(StepOutput(outputs=outputs, stats=stats))
        self._play(request, steps[1:])

    def emit(self, text: str, *, sample: int = 0, request: int = -1) -> None:
        """One more output of a request whose script has run out."""
        request_id = self.requests[request].request_id
        output = TokenOutput(request_id=request_id, sample_index=sample, token_ids=list(text.encode()))
        self.handle(StepOutput(outputs=[output], stats=StepStats()))


def config(**overrides: Any) -> ServerConfig:
    engine = EngineConfig(model=ModelConfig(path="fake"))
    return ServerConfig(**({"engine": engine, "served_model_names": ("fake", "alias")} | overrides))


def make_app(engine: EngineClient, *, defaults: dict[str, float] | None = None, **overrides: Any) -> FastAPI:
    return create_app(engine, config(**overrides), TOKENIZER, defaults or {})


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """The app's lifespan, and a client that calls it directly."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as http,
    ):
        yield http


class LiveServer:
    """The app under uvicorn, in a thread, on a loopback port."""

    def __init__(self, engine: FakeEngineClient, **overrides: Any) -> None:
        self.engine = engine
        self.app = make_app(engine, **overrides)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(
            uvicorn.Config(self.app, log_level="warning", timeout_graceful_shutdown=1, access_log=False)
        )
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> LiveServer:
        self._thread.start()
        wait_until(lambda: self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        self._socket.close()


def wait_until(condition: Callable[[], Any]) -> None:
    """Poll until true; fails after a deadline that no healthy run comes near."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.005)


def chat(**fields: Any) -> dict[str, Any]:
    """A chat body."""
    return {"messages": [{"role": "user", "content": "hi"}]} | fields


def events(body: str) -> list[Any]:
    """The payloads of an event stream; every event must end with its blank line."""
    assert body.endswith("\n\n")
    parsed: list[Any] = []
    for block in body[:-2].split("\n\n"):
        assert block.startswith("data: ")
        assert "\n" not in block
        data = block.removeprefix("data: ")
        parsed.append(data if data == "[DONE]" else json.loads(data))
    return parsed


def streamed_texts(parsed: list[Any]) -> dict[int, str]:
    """Choice index → its text, from the events of a stream of either kind."""
    texts: dict[int, str] = {}
    for part in parsed:
        for choice in [] if part == "[DONE]" else part.get("choices", []):
            text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
            texts[choice["index"]] = texts.get(choice["index"], "") + text
    return texts


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, after checking that it has the shape that clients understand."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


def metric(text: str, name: str, **labels: str) -> float:
    """One sample of a Prometheus exposition."""
    for line in text.splitlines():
        head, _, value = line.rpartition(" ")
        if head.partition("{")[0] == name and all(f'{key}="{wanted}"' in head for key, wanted in labels.items()):
            return float(value)
    raise AssertionError(f"no sample {name} {labels}")
