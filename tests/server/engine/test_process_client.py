"""The supervisor around scripted engine processes: whatever they do, nobody is left waiting."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable

import pytest
from http_fakes import READY
from octavo.model.config import ModelConfig
from octavo.scheduler.sampling_params import SamplingParams
from octavo.server.config import EngineConfig
from octavo.server.engine import process as process_module
from octavo.server.engine.client import EngineState, EngineUnavailable
from octavo.server.engine.messages import EngineDead, GenerateRequest, StepOutput, StepStats, TokenOutput
from octavo.server.engine.process import ProcessClient
from octavo.server.engine.wire import ConnectionClosed, down_decoder, encode_frame, frame

CONFIG = EngineConfig(model=ModelConfig(path="unused"))

Script = Callable[[socket.socket], None]


class ScriptedProcess:
    """Stands for EngineProcess; its end of the socket is driven by a function in a thread."""

    scripts: list[Script]

    def __init__(self, config: EngineConfig, log_level: str = "info") -> None:
        self.socket, theirs = socket.socketpair()
        script = self.scripts.pop(0)
        self.stopped = False
        self._thread = threading.Thread(target=self._run, args=(script, theirs), daemon=True)
        self._thread.start()

    def _run(self, script: Script, theirs: socket.socket) -> None:
        with theirs:
            script(theirs)

    pid = 1

    def describe_exit(self) -> str:
        return "the scripted engine ended"

    def stop(self, grace_s: float) -> None:
        self.stopped = True


def ready_then(*payloads: bytes) -> Script:
    """Become ready, wait for one request, send the payloads, end."""

    def script(theirs: socket.socket) -> None:
        theirs.sendall(encode_frame(READY))
        theirs.recv(65536)
        for payload in payloads:
            theirs.sendall(payload)

    return script


def stay(theirs: socket.socket) -> None:
    theirs.sendall(encode_frame(READY))
    while theirs.recv(65536):
        pass


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ProcessClient]:
    def make(*scripts: Script, max_restarts: int = 3) -> ProcessClient:
        monkeypatch.setattr(ScriptedProcess, "scripts", list(scripts), raising=False)
        monkeypatch.setattr(process_module, "EngineProcess", ScriptedProcess)
        monkeypatch.setattr(process_module, "_BACKOFF_S", 0.0)
        return ProcessClient(CONFIG, max_restarts=max_restarts)

    return make


def request(name: str = "a") -> GenerateRequest:
    return GenerateRequest(request_id=name, prompt_token_ids=[1], params=SamplingParams(max_tokens=4))


async def last_output(client: ProcessClient, name: str = "a") -> TokenOutput:
    stream = client.submit(request(name))
    outputs: list[TokenOutput] = []
    while not stream.finished:
        outputs += await asyncio.wait_for(stream.next(), 30)
    return outputs[-1]


@pytest.mark.parametrize(
    "ending",
    [b"", frame(b"garbage"), encode_frame(EngineDead("out of memory"))],
    ids=["end of stream", "garbage", "its own word"],
)
def test_open_requests_end_and_another_engine_serves(client: Callable[..., ProcessClient], ending: bytes) -> None:
    async def scenario() -> None:
        subject = client(ready_then(ending), stay)
        await subject.start()
        await asyncio.wait_for(subject.wait_ready(), 30)
        output = await last_output(subject)
        assert output.error is not None
        assert output.error.code == "engine_dead"
        await asyncio.wait_for(subject.wait_ready(), 30)
        assert subject.num_restarts == 1
        await subject.close()
        await subject.close()
        assert subject.state is EngineState.CLOSED

    asyncio.run(scenario())


def test_a_dead_engine_s_load_is_taken_back_and_its_process_forgotten(client: Callable[..., ProcessClient]) -> None:
    busy = StepOutput(outputs=[TokenOutput(request_id="a", token_ids=[5])], stats=StepStats(num_running=1))

    async def scenario() -> None:
        subject = client(ready_then(encode_frame(busy)), max_restarts=0)
        heard: list[StepStats] = []
        subject.stats_listeners.append(heard.append)
        assert subject.engine_pid is None
        await subject.start()
        await asyncio.wait_for(subject.wait_ready(), 30)
        assert subject.engine_pid == 1
        await last_output(subject)
        assert await asyncio.wait_for(subject.wait_while(EngineState.STARTING), 30) is EngineState.DEAD
        assert heard[0].num_running == 1
        assert heard[-1] == StepStats()
        assert subject.engine_pid is None
        await subject.close()

    asyncio.run(scenario())


def test_an_engine_that_was_never_ready_is_not_replaced(client: Callable[..., ProcessClient]) -> None:
    async def scenario() -> None:
        subject = client(lambda theirs: theirs.sendall(encode_frame(EngineDead("no such file"))))
        await subject.start()
        with pytest.raises(EngineUnavailable, match="no such file"):
            await asyncio.wait_for(subject.wait_ready(), 30)
        assert subject.state is EngineState.DEAD

    asyncio.run(scenario())


def test_a_restart_that_fails_is_tried_again_up_to_the_limit(client: Callable[..., ProcessClient]) -> None:
    def fails(theirs: socket.socket) -> None:
        theirs.sendall(encode_frame(EngineDead("still no memory")))

    async def scenario() -> None:
        subject = client(ready_then(), fails, fails, stay)
        await subject.start()
        await asyncio.wait_for(subject.wait_ready(), 30)
        await last_output(subject)
        await asyncio.wait_for(subject.wait_ready(), 30)
        assert subject.num_restarts == 3
        await subject.close()
        subject = client(ready_then(), fails, max_restarts=1)
        await subject.start()
        await asyncio.wait_for(subject.wait_ready(), 30)
        await last_output(subject)
        assert await asyncio.wait_for(subject.wait_while(EngineState.STARTING), 30) is EngineState.DEAD
        assert subject.dead_reason == "still no memory"

    asyncio.run(scenario())


def test_a_process_that_cannot_be_started_is_the_end_not_a_hang(
    client: Callable[..., ProcessClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        subject = client(ready_then())
        await subject.start()
        await asyncio.wait_for(subject.wait_ready(), 30)

        def refuse(config: EngineConfig, log_level: str) -> ScriptedProcess:
            raise OSError("cannot allocate memory")

        monkeypatch.setattr(process_module, "EngineProcess", refuse)
        await last_output(subject)
        assert await asyncio.wait_for(subject.wait_while(EngineState.STARTING), 30) is EngineState.DEAD
        assert "cannot allocate memory" in (subject.dead_reason or "")
        await subject.close()

    asyncio.run(scenario())


def test_a_failing_listener_does_not_stop_the_stream(client: Callable[..., ProcessClient]) -> None:
    def answer(theirs: socket.socket) -> None:
        theirs.sendall(encode_frame(READY))
        received = theirs.recv(65536)
        assert isinstance(down_decoder.decode(received[4:]), GenerateRequest)
        finished = TokenOutput(request_id="a", token_ids=[5], finish_reason="length")
        theirs.sendall(encode_frame(StepOutput(outputs=[finished], stats=StepStats())))
        theirs.recv(65536)

    def broken(stats: StepStats) -> None:
        raise ConnectionClosed("a bug in a dashboard")

    async def scenario() -> None:
        subject = client(answer)
        subject.stats_listeners.append(broken)
        await subject.start()
        await asyncio.wait_for(subject.wait_ready(), 30)
        assert (await last_output(subject)).token_ids == [5]
        await subject.close()

    asyncio.run(scenario())
