"""`octavo chat` against the real server with the default model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import ServerProcess  # type: ignore[import-not-found]

pytestmark = pytest.mark.real_model
COMMAND = str(Path(sys.executable).with_name("octavo"))


def chat(*arguments: str, url: str, given: str = "") -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OCTAVO_", "OPENAI_"))}
    return subprocess.run(
        [COMMAND, "chat", "--base-url", url, *arguments],
        input=given,
        capture_output=True,
        text=True,
        env=environ,
        timeout=120,
        check=False,
    )


def test_a_piped_question_is_answered(server: ServerProcess) -> None:
    settings = ("--set", "temperature=0", "--set", "max_tokens=24")
    first = chat(*settings, url=server.url, given="What is the capital of France?")
    assert first.returncode == 0, first.stderr
    assert "Paris" in first.stdout
    assert chat(*settings, "What is the capital of France?", url=server.url).stdout == first.stdout


def test_the_servers_own_words_are_shown(server: ServerProcess) -> None:
    wrong = chat("--set", "top_p=2", "hi", url=server.url)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "top_p" in wrong.stderr
    assert wrong.stderr.count("\n") == 1
    unknown = chat("--model", "nobody", "hi", url=server.url)
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "nobody" in unknown.stderr


def test_a_reader_that_leaves_stops_the_model(
    server: ServerProcess, eventually: Callable[[Callable[[], bool], str], None]
) -> None:
    process = subprocess.Popen(
        [COMMAND, "chat", "--base-url", server.url, "--set", "temperature=0", "Write a long story about a dragon."],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    assert server.metric("num_requests_running") == 1
    process.stdout.close()
    eventually(lambda: server.metric("num_requests_running") == 0, "the request has been aborted")
    assert process.wait(60) == 141
