"""A scripted server, and an environment without the user's own settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from chat_server import FakeChatServer, Terminal


@pytest.fixture
def server() -> Iterator[FakeChatServer]:
    with FakeChatServer() as server:
        yield server


@pytest.fixture
def env(server: FakeChatServer, tmp_path: Path) -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OCTAVO_", "OPENAI_"))}
    return environ | {
        "OCTAVO_BASE_URL": server.url,
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "TERM": "dumb",
        "INPUTRC": "/dev/null",
    }


@pytest.fixture
def terminal(env: dict[str, str]) -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def start(*arguments: str, **changes: str) -> Terminal:
        started.append(Terminal(*arguments, env=env | changes))
        return started[-1]

    yield start
    for one in started:
        one.close()
