"""`octavo plan` of models on the hub, against a hub of our own: what is fetched, and what never is."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 1000,
}
PARAMETERS = 1000 * 64 + 64 + 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64)


@dataclass
class FakeHub:
    """Serves one repository, org/name, and remembers what was asked of it."""

    files: dict[str, bytes]
    requests: list[str] = field(default_factory=list)
    """Method, path, and the range where there was one."""
    num_file_bytes: int = 0
    """Sent of files' contents."""
    url: str = ""


class HubHandler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.hub.requests.append(f"POST {self.path}")
        names = [name for name in asked["paths"] if name in self.hub.files]
        self._send(200, json.dumps([self._entry(name) for name in names]).encode(), "application/json")

    def _entry(self, name: str) -> dict[str, Any]:
        digest = hashlib.sha256(self.hub.files[name]).hexdigest()
        return {"type": "file", "path": name, "size": len(self.hub.files[name]), "oid": digest[:40]}

    def _answer(self, *, body: bool) -> None:
        self.hub.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        if self.path.startswith("/api/models/org/name/tree/"):
            self._send(200, json.dumps([self._entry(name) for name in self.hub.files]).encode(), "application/json")
            return
        if self.path.startswith("/api/models/org/name"):
            info = {"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.hub.files]}
            self._send(200, json.dumps(info).encode(), "application/json")
            return
        match = re.fullmatch(r"/org/name/resolve/[^/]+/(.+)", self.path)
        data = self.hub.files.get(match[1]) if match else None
        if data is None:
            code = "EntryNotFound" if match else "RepoNotFound"
            self._send(404, b"", "text/plain", {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, body=body)
            return
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()[:40]}"', "X-Repo-Commit": COMMIT}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span and body:
            start, stop = int(span[1]), min(int(span[2] or len(data) - 1) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data = data[start:stop]
        self.hub.num_file_bytes += len(data) if body else 0
        self._send(206 if span else 200, data, "application/octet-stream", headers, body=body)

    def _send(
        self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None, *, body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def tiny_gguf(path: Path, num_names: int) -> bytes:
    """A header with so many vocabulary entries, over 8 MiB of weights."""
    writer = GGUFWriter(str(path), "gemma3")
    writer.add_block_count(6)
    writer.add_context_length(4096)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_uint32("gemma3.attention.sliding_window", 512)
    writer.add_token_list([f"piece number {index}" for index in range(num_names)])
    writer.add_tensor("token_embd.weight", np.zeros((32768, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    folder = tmp_path_factory.mktemp("hub")
    fake = FakeHub(
        {
            "config.json": json.dumps(CONFIG).encode(),
            "model.safetensors": b"never to be asked for",
            "small.gguf": tiny_gguf(folder / "small.gguf", 100),
            "large.gguf": tiny_gguf(folder / "large.gguf", 60_000),
            "broken.gguf": b"no GGUF" * 10**6,
        }
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": fake}))
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield fake
    server.shutdown()
    thread.join()
    server.server_close()


def plan(hub: FakeHub, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's address is read when its library is imported."""
    hub.requests.clear()
    hub.num_file_bytes = 0
    temporary = cache / "tmp"
    temporary.mkdir(exist_ok=True)
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "0"}
    command = [str(Path(sys.executable).with_name("octavo")), "plan", *arguments, "--json", "--memory", "4GiB"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert list(temporary.iterdir()) == []
    return done


def test_of_a_repository_only_the_config_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    done = plan(hub, tmp_path, "org/name")
    assert done.returncode == 0, done.stderr
    model = json.loads(done.stdout)["model"]
    assert (model["name"], model["read"], model["num_parameters"]) == ("org/name", "config.json", PARAMETERS)
    assert model["served"] is True
    paths = {request.split()[1] for request in hub.requests}
    assert {path for path in paths if path.startswith("/org/")} == {"/org/name/resolve/main/config.json"}
    assert json.loads(done.stdout)["server"]["command"][2] == "org/name"


@pytest.mark.parametrize(("name", "num_requests"), [("small.gguf", 1), ("large.gguf", 2)])
def test_of_a_gguf_file_only_the_header_is_fetched(hub: FakeHub, tmp_path: Path, name: str, num_requests: int) -> None:
    done = plan(hub, tmp_path, f"org/name:{name}")
    assert done.returncode == 1, done.stderr  # numbers, and no server
    model = json.loads(done.stdout)["model"]
    assert "the checkpoint lacks tensor model.layers.0" in model["refusal"]
    assert model["read"] == f"the header of {name}"
    assert model["stored_bytes"] == len(hub.files[name])
    assert model["num_parameters"] == 32768 * 64
    assert [(layer["layers"], layer["window"]) for layer in model["kv_layers"]] == [([5], None), ([0, 1, 2, 3, 4], 512)]
    ranges = [request for request in hub.requests if "bytes=" in request]
    assert len(ranges) == num_requests
    assert hub.num_file_bytes == num_requests * 2**20 < len(hub.files[name]) / 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/name:missing.gguf", "the hub has no such file"),
        ("org/name:broken.gguf", "broken.gguf is not a GGUF file"),
        ("org/other", "the hub has no such repository"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(hub: FakeHub, tmp_path: Path, name: str, message: str) -> None:
    done = plan(hub, tmp_path, name)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert hub.num_file_bytes <= 2**20
