"""Clients that leave: what they asked for must end with them. Raw sockets against a real uvicorn server."""

from __future__ import annotations

import json
import random
import socket
import struct
from typing import Any

import httpx
import pytest
from http_fakes import FakeEngineClient, LiveServer, chat, metric, says, wait_until


def connect(live: LiveServer, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request; the caller reads, or leaves."""
    connection = socket.create_connection(("127.0.0.1", live.port), timeout=20)
    post(connection, path, body)
    return connection


def post(connection: socket.socket, path: str, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)


def read_until(connection: socket.socket, wanted: bytes) -> bytes:
    data = b""
    while wanted not in data:
        block = connection.recv(65536)
        assert block, data
        data += block
    return data


def aborted_samples(live: LiveServer) -> float:
    text = httpx.get(f"{live.url}/metrics").text
    return metric(text, "octavo:request_success_total", finished_reason="abort")


def reset(connection: socket.socket) -> None:
    """Leave without a goodbye."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


REQUESTS = [
    ("/v1/chat/completions", chat()),
    ("/v1/chat/completions", chat(stream=True)),
    ("/v1/completions", {"prompt": ["a", "b"], "n": 2}),
    ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "stream": True}),
]


@pytest.mark.parametrize(("path", "body"), REQUESTS)
@pytest.mark.parametrize("hard", [False, True])
def test_leaving_before_any_output_aborts(
    live: LiveServer, engine: FakeEngineClient, path: str, body: dict[str, Any], hard: bool
) -> None:
    engine.script = lambda request: []
    num_requests = len(body.get("prompt", "x"))
    connection = connect(live, path, body)
    wait_until(lambda: len(engine.requests) == num_requests)
    if hard:
        reset(connection)
    else:
        connection.close()
    wait_until(lambda: not engine.num_open_requests)
    assert {abort.request_id for abort in engine.aborts} == {request.request_id for request in engine.requests}


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_leaving_in_the_middle_aborts(
    live: LiveServer, engine: FakeEngineClient, path: str, body: dict[str, Any]
) -> None:
    engine.script = says("Hel", finish=False, with_eos=False, per_step=3)
    num_requests = len(body.get("prompt", "x"))
    connection = connect(live, path, body)
    if body.get("stream"):
        read_until(connection, b'"Hel"')
    wait_until(lambda: len(engine.requests) == num_requests)
    connection.close()
    wait_until(lambda: not engine.num_open_requests)
    assert {abort.request_id for abort in engine.aborts} == {request.request_id for request in engine.requests}
    wait_until(
        lambda: (
            live.app.state.server.metrics.request_success["abort"]._value.get()
            == len(engine.requests) * body.get("n", 1)
        )
    )


def test_resets_at_random_places_leave_nothing(live: LiveServer, engine: FakeEngineClient) -> None:
    engine.script = says("x" * 200)
    generator = random.Random(0)
    for number in range(60):
        path, body = REQUESTS[number % len(REQUESTS)]
        connection = connect(live, path, body)
        num_bytes = generator.randrange(0, 4000)
        while num_bytes > 0 and (block := connection.recv(min(num_bytes, 500))):
            num_bytes -= len(block)
            if not body.get("stream"):
                break
        reset(connection)
    wait_until(lambda: not engine.num_open_requests and not live.app.state.server.num_open_generations)
    engine.script = says("ok")
    connection = connect(live, "/v1/chat/completions", chat())
    assert b'"ok"' in read_until(connection, b"usage")
    connection.close()


def test_a_finished_request_is_not_aborted(live: LiveServer, engine: FakeEngineClient) -> None:
    connection = connect(live, "/v1/chat/completions", chat(stream=True))
    read_until(connection, b"[DONE]")
    connection.close()
    wait_until(lambda: not engine.num_open_requests)
    assert not engine.aborts


def test_a_client_that_stops_reading_holds_nobody_up(live: LiveServer, engine: FakeEngineClient) -> None:
    engine.script = says("x" * 20_000, finish=False, with_eos=False)
    sleeper = connect(live, "/v1/chat/completions", chat(stream=True))
    wait_until(lambda: live.app.state.server.num_open_generations == 1)
    engine.script = says("ok")
    other = connect(live, "/v1/chat/completions", chat())
    assert b'"ok"' in read_until(other, b"usage")
    other.close()
    sleeper.close()
    wait_until(lambda: not engine.num_open_requests and not live.app.state.server.num_open_generations)


def test_one_keep_alive_connection_serves_many(live: LiveServer, engine: FakeEngineClient) -> None:
    connection = connect(live, "/v1/chat/completions", chat(stream=True))
    read_until(connection, b"0\r\n\r\n")
    post(connection, "/v1/chat/completions", chat())
    assert b"Hello world" in read_until(connection, b"usage")
    connection.close()


def test_a_server_that_must_leave_says_so() -> None:
    engine = FakeEngineClient(says("Hel", finish=False, with_eos=False, per_step=3))
    with LiveServer(engine) as live:
        streaming = connect(live, "/v1/chat/completions", chat(stream=True))
        read_until(streaming, b'"Hel"')
        waiting = connect(live, "/v1/chat/completions", chat())
        wait_until(lambda: len(engine.requests) == 2)
    rest = read_until(streaming, b"\r\n\r\n")
    assert b'data: {"error":' in rest
    assert b"[DONE]" not in rest
    answer = read_until(waiting, b"\r\n\r\n")
    assert b" 503 " in answer.splitlines()[0]
    assert b"retry-after" in answer.lower()
    streaming.close()
    waiting.close()
    assert not engine.num_open_requests
