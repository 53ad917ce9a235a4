"""API keys: every route needs one but an explicit list, however the path is spelled."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from fastapi import FastAPI
from http_fakes import FakeEngineClient, LiveServer, chat, error_of, make_app, serving

pytestmark = pytest.mark.anyio
KEYS = ("key-one", "key-two")
GOOD = {"Authorization": "Bearer key-two"}
OPEN = {"/health", "/live", "/ready", "/metrics", "/version"}
OPEN_TO_READ = {"/docs", "/openapi.json"}
BAD = [
    {},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer "},
    {"Authorization": "Bearer wrong"},
    {"Authorization": "Bearer key-on"},
    {"Authorization": "Bearer key-one key-two"},
    {"Authorization": "Basic key-one"},
    {"Authorization": "key-one"},
    {"X-Api-Key": "key-one"},
]


@pytest.fixture
def locked(engine: FakeEngineClient) -> FastAPI:
    return make_app(engine, api_keys=KEYS)


@pytest.fixture
async def door(locked: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(locked) as client:
        yield client


def all_paths(app: FastAPI) -> set[str]:
    documented = set(app.openapi()["paths"])
    undocumented = {path for path in (getattr(route, "path", None) for route in app.routes) if path}
    return documented | undocumented


async def test_every_route_is_closed_but_the_listed_ones(locked: FastAPI, door: httpx.AsyncClient) -> None:
    paths = all_paths(locked)
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", *OPEN, *OPEN_TO_READ} <= paths
    for path in paths | {"/nope"}:
        for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE"):
            response = await door.request(method, path.replace("{id:path}", "fake").replace("{id}", "fake"))
            is_open = (path in OPEN and method in ("GET", "HEAD")) or (path in OPEN_TO_READ and method == "GET")
            assert (response.status_code != 401) == is_open, (method, path)


async def test_a_browser_can_read_the_documentation(door: httpx.AsyncClient) -> None:
    for path in OPEN_TO_READ:
        response = await door.get(path)
        assert response.status_code == 200
        assert not any(key in response.text for key in KEYS)
    for path in ("/docs/", "/docs/oauth2-redirect", "/openapi.json/", "//docs", "/Docs", "/redoc"):
        error_of(await door.get(path), 401)


@pytest.mark.parametrize("headers", BAD)
async def test_wrong_keys(door: httpx.AsyncClient, engine: FakeEngineClient, headers: dict[str, str]) -> None:
    response = await door.post("/v1/chat/completions", json=chat(), headers=headers)
    error = error_of(response, 401)
    assert error["code"] == "invalid_api_key"
    assert "key-one" not in response.text
    assert response.headers["www-authenticate"] == "Bearer"
    assert not engine.requests


async def test_two_authorization_headers_are_none(door: httpx.AsyncClient) -> None:
    headers = [("Authorization", "Bearer key-one"), ("Authorization", "Bearer wrong")]
    error_of(await door.get("/v1/models", headers=headers), 401)


@pytest.mark.parametrize("key", KEYS)
async def test_right_keys(door: httpx.AsyncClient, key: str) -> None:
    response = await door.get("/v1/models", headers={"Authorization": f"bearer {key}"})
    assert response.status_code == 200


async def test_body_of_a_stranger_is_not_read(locked: FastAPI) -> None:
    async def body():  # type: ignore[no-untyped-def]
        raise AssertionError("read")
        yield b""

    async with serving(locked) as http:
        error_of(await http.post("/v1/completions", content=body()), 401)


async def test_prefix_cache_salts_differ_by_key_and_by_salt(door: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    salts = []
    for key in KEYS:
        for fields in ({}, {"cache_salt": "s"}, {"cache_salt": ""}):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await door.post("/v1/chat/completions", json=chat(**fields), headers=headers)).status_code == 200
            salts.append(engine.requests[-1].cache_salt)
    assert salts[0] == salts[2]
    assert salts[3] == salts[5]
    assert len(set(salts)) == 4
    assert all(len(salt) == 64 and "key" not in salt for salt in salts)
    long = await door.post("/v1/chat/completions", json=chat(cache_salt="s" * 1025), headers=GOOD)
    assert error_of(long, 400)["param"] == "cache_salt"


async def test_salts_differ_between_processes(engine: FakeEngineClient) -> None:
    apps = [make_app(engine, api_keys=KEYS) for _ in range(2)]
    assert len({app.state.server.cache_salt(b"key-one", None) for app in apps}) == 2


async def test_without_keys_the_salt_is_the_request_s_own(http: httpx.AsyncClient, engine: FakeEngineClient) -> None:
    await http.post("/v1/chat/completions", json=chat())
    assert engine.requests[0].cache_salt == ""


@pytest.fixture
def locked_live(engine: FakeEngineClient) -> Iterator[LiveServer]:
    with LiveServer(engine, api_keys=KEYS) as server:
        yield server


@pytest.mark.parametrize(
    "target",
    ["//v1/models", "/./v1/models", "/health/../v1/models", "/%76%31/models", "/health%2f..%2fv1/models",
     "/v1/models?/health", "/health/", "//health", "/health;a", "/HEALTH", "http://a/?x=/v1/models", "*",
     "/v1/models#/health"],
)  # fmt: skip
@pytest.mark.parametrize("host", ["localhost", "a/?x=", "localhost/health?"])
def test_odd_targets_fail_closed(locked_live: LiveServer, target: str, host: str) -> None:
    status, _ = raw_exchange(locked_live.port, f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
    assert status in (400, 401, 404), status


def raw_exchange(port: int, request: str) -> tuple[int, bytes]:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(request.encode())
        data = b""
        while block := connection.recv(65536):
            data += block
    return int(data.split()[1]), data


def test_websockets_are_refused(locked_live: LiveServer) -> None:
    upgrade = (
        "GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    status, _ = raw_exchange(locked_live.port, upgrade)
    assert status >= 400


def test_keys_work_over_the_wire(locked_live: LiveServer) -> None:
    results = [httpx.get(f"{locked_live.url}/v1/models", headers=headers).status_code for headers in (GOOD, {})]
    assert results == [200, 401]
