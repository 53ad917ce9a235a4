"""The engine process's loop: what goes over the socket, and when."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from octavo.scheduler.batch import ScheduledBatch
from octavo.server.engine import worker
from octavo.server.engine.core import EngineCore
from octavo.server.engine.messages import Abort, Shutdown, StepOutput
from octavo.server.engine.wire import Channel, ConnectionClosed, FrameBuffer, encode_frame, frame, up_decoder
from octavo.server.engine.worker import serve
from scripted_engine import OverlappingRunner, core_of, request


def tokens_from(peer: socket.socket, num_tokens: int) -> list[int]:
    """Read messages until they have brought so many tokens, or the end has come."""
    peer.settimeout(30)
    deadline = time.monotonic() + 30  # signs of life come for ever
    buffer, tokens = FrameBuffer(), list[int]()
    while len(tokens) < num_tokens and (data := peer.recv(65536)):
        for payload in buffer.feed(data):
            message = up_decoder.decode(payload)
            assert isinstance(message, StepOutput)
            tokens += [token for output in message.outputs for token in output.token_ids]
        assert time.monotonic() < deadline, f"only {len(tokens)} tokens came"
    return tokens


def test_the_worker_loop_serves_a_socket_until_shutdown(core: EngineCore) -> None:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=serve, args=(core, Channel(theirs)), daemon=True)
    thread.start()
    ours.sendall(encode_frame(request("a")) + encode_frame(request("b")) + encode_frame(Abort("b")))
    buffer, tokens, ended = FrameBuffer(), [], False
    ours.settimeout(30)
    while not ended:
        for payload in buffer.feed(ours.recv(65536)):
            message = up_decoder.decode(payload)
            assert isinstance(message, StepOutput)
            for output in message.outputs:
                assert output.request_id == "a"
                tokens += output.token_ids
                ended = output.finish_reason is not None
    assert tokens == [7, 7, 7]
    ours.sendall(encode_frame(Shutdown()))
    thread.join(30)
    assert not thread.is_alive()


def test_the_worker_reports_what_it_took_to_send_a_step(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "HEARTBEAT_S", 0.01)
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=serve, args=(core, Channel(theirs)), daemon=True)
    thread.start()
    ours.settimeout(30)
    buffer, stats = FrameBuffer(), []
    while not stats:  # the pool's size comes before anything is asked for
        stats += [up_decoder.decode(payload).stats for payload in buffer.feed(ours.recv(65536))]  # type: ignore[union-attr]
    assert (stats[0].num_blocks, stats[0].num_free_blocks, stats[0].num_running) == (256, 256, 0)
    ours.sendall(encode_frame(request("a")))
    while sum(item.emit_seconds > 0 for item in stats) < 3:  # the third with the first sign of life after it
        stats += [up_decoder.decode(payload).stats for payload in buffer.feed(ours.recv(65536))]  # type: ignore[union-attr]
    assert sum(item.num_generation_tokens for item in stats) == 3
    assert stats[-1].num_scheduled_tokens == 0
    ours.sendall(encode_frame(Shutdown()))
    thread.join(30)
    assert not thread.is_alive()


def test_a_step_s_tokens_are_sent_before_the_next_step_has_ended() -> None:
    runner = OverlappingRunner()
    ours, theirs = socket.socketpair()
    arrived = list[int]()

    def at_result() -> None:
        num_steps = runner.events.count("result")
        if num_steps > 1:
            arrived.extend(tokens_from(ours, 1))  # of the step before
        if num_steps == 3:
            ours.sendall(encode_frame(Shutdown()))

    runner.at_result = at_result
    ours.sendall(encode_frame(request("a")))
    serve(core_of(runner), Channel(theirs))
    assert arrived == [7, 7]
    assert tokens_from(ours, 1) == [7]  # no step follows the last one


def test_what_a_step_has_brought_is_sent_when_nothing_is_left_to_compute() -> None:
    runner = OverlappingRunner()
    ours, theirs = socket.socketpair()
    runner.at_result = lambda: ours.sendall(encode_frame(Abort("b")))  # during the only step
    ours.sendall(encode_frame(request("a", max_tokens=1)) + encode_frame(request("b")))
    thread = threading.Thread(target=serve, args=(core_of(runner), Channel(theirs)), daemon=True)
    thread.start()
    arrived = tokens_from(ours, 2)
    ours.sendall(encode_frame(Shutdown()))
    thread.join(30)
    assert not thread.is_alive()
    assert arrived == [7, 7]


def test_what_a_step_has_brought_is_sent_even_if_the_next_one_cannot_be_scheduled(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule, turns = core.scheduler.schedule, iter(range(5))

    def schedule_some() -> ScheduledBatch:
        if next(turns) == 3:  # after a sign of life and two steps
            raise RuntimeError("a mistake")
        return schedule()

    monkeypatch.setattr(core.scheduler, "schedule", schedule_some)
    ours, theirs = socket.socketpair()
    ours.sendall(encode_frame(request("a")))
    with theirs, pytest.raises(RuntimeError, match="a mistake"):
        serve(core, Channel(theirs))
    assert tokens_from(ours, 2) == [7, 7]


def test_the_worker_leaves_when_its_server_is_gone(core: EngineCore) -> None:
    ours, theirs = socket.socketpair()
    ours.sendall(frame(b"")[:2])
    ours.close()
    with pytest.raises(ConnectionClosed):
        serve(core, Channel(theirs))
