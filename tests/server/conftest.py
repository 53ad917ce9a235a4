"""Fixtures of the HTTP tests. `http_fakes` is importable because this folder is on the path (importlib mode)."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

sys.path.append(str(Path(__file__).parent))

from http_fakes import FakeEngineClient, LiveServer, make_app, serving


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def engine() -> FakeEngineClient:
    return FakeEngineClient()


@pytest.fixture
async def http(engine: FakeEngineClient) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(make_app(engine)) as client:
        yield client


@pytest.fixture
def live(engine: FakeEngineClient) -> Iterator[LiveServer]:
    with LiveServer(engine) as server:
        yield server
