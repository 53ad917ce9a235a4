"""A real server process for the tests of this folder, and the model it serves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

START_DEADLINE_S = 120.0


class ServerProcess:
    """`octavo serve` in a process of its own, as a user starts it."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        command = Path(sys.executable).with_name("octavo")
        self.popen = subprocess.Popen(
            [str(command), "serve", "--port", "0", "--kv-cache-memory", "256MiB", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for_line(self, pattern: str) -> re.Match[str]:
        """The first line that matches, waiting for it to be printed."""
        deadline = time.monotonic() + START_DEADLINE_S
        with self._changed:
            while True:
                for line in self.lines:
                    if match := re.search(pattern, line):
                        return match
                remaining = deadline - time.monotonic()
                if self._ended or remaining <= 0:
                    raise AssertionError(f"no line matches {pattern!r} in:\n{self.output}")
                self._changed.wait(remaining)

    @property
    def url(self) -> str:
        return self.wait_for_line(r"API\s+(http://\S+)/v1")[1]

    def engine_pid(self) -> int:
        listed = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.popen.pid)], capture_output=True, text=True, check=True
        )
        (pid,) = [int(line.split()[0]) for line in listed.stdout.splitlines() if "octavo.server.engine.worker" in line]
        return pid

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        _, text = self.get("/metrics")
        values = re.findall(rf"^octavo:{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        assert values, f"no metric {name}"
        return sum(map(float, values))

    def post(self, path: str, body: object) -> tuple[int, dict[str, object]]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def stop(self) -> int:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        return self.popen.wait(60)


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """One server with the default model, shared by all tests that do not harm it.

    In fp32: under bf16 rounding, near-ties of this small model fall differently with batch and cache hits, and these
    tests compare texts.
    """
    process = ServerProcess("--dtype", "float32")
    yield process
    process.stop()


@pytest.fixture
def start_server() -> Iterator[Callable[..., ServerProcess]]:
    """Start servers of one's own, to be harmed."""
    started: list[ServerProcess] = []

    def start(*arguments: str, env: dict[str, str] | None = None) -> ServerProcess:
        started.append(ServerProcess(*arguments, env=env))
        return started[-1]

    yield start
    for process in started:
        if process.popen.poll() is None:
            process.popen.kill()
            process.popen.wait()


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool], str], None]:
    """Poll a condition until it holds, within a deadline that only a hang exceeds."""

    def wait(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        pause = threading.Event()
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {seconds:.0f} s: {what}")
            pause.wait(0.05)

    return wait
