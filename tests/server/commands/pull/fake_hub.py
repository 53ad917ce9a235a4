"""As much of the Hugging Face hub as fetching a model needs, with ways to misbehave."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

_LARGE = {".safetensors", ".gguf", ".onnx", ".bin"}


class Repository:
    """Files at one commit. `served` may differ from what the listing says."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.listed = dict(files)
        self.served = dict(files)
        self.gated = False
        self.commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

    def sha256(self, name: str) -> str | None:
        return hashlib.sha256(self.listed[name]).hexdigest() if PurePosixPath(name).suffix in _LARGE else None

    def git_sha1(self, name: str) -> str:
        data = self.listed[name]
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def siblings(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        for name, data in self.listed.items():
            entries.append({"rfilename": name, "size": len(data), "blobId": self.git_sha1(name)})
            if sha256 := self.sha256(name):
                entries[-1]["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
        return entries

    def tree(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        for name, data in self.listed.items():
            entries.append({"type": "file", "path": name, "size": len(data), "oid": self.git_sha1(name)})
            if sha256 := self.sha256(name):
                entries[-1]["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
        return entries


class FakeHub:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.downloads: list[str] = []
        """The files whose content was sent, in order."""
        self.num_requests = 0
        self.gate = threading.Event()
        """Contents are withheld until it is set."""
        self.gate.set()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def add(self, name: str, files: dict[str, bytes]) -> Repository:
        self.repositories[name] = Repository(files)
        return self.repositories[name]

    def wait_for_download(self) -> None:
        deadline = time.monotonic() + 60
        while not self.downloads:
            assert time.monotonic() < deadline, "nothing was fetched"
            time.sleep(0.01)

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        self.hub.num_requests += 1
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            self._serve_api(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._serve_file(match[1], match[2], match[3])
        else:
            self._refuse(404, "EntryNotFound")

    def _find(self, repo: str, revision: str) -> Repository | None:
        repository = self.hub.repositories.get(repo)
        if repository is None:
            self._refuse(401, "RepoNotFound")
        elif revision not in ("main", repository.commit):
            self._refuse(404, "RevisionNotFound")
            return None
        return repository

    def _serve_api(self, repo: str, kind: str | None, revision: str | None) -> None:
        repository = self._find(repo, revision or "main")
        if repository is None:
            return
        info = {"id": repo, "sha": repository.commit, "siblings": repository.siblings()}
        self._send(200, json.dumps(repository.tree() if kind == "tree" else info).encode(), {})

    def _serve_file(self, repo: str, revision: str, name: str) -> None:
        repository = self._find(repo, revision)
        if repository is None:
            return
        if repository.gated:
            self._refuse(403, "GatedRepo")
            return
        if name not in repository.served:
            self._refuse(404, "EntryNotFound")
            return
        headers = {
            "X-Repo-Commit": repository.commit,
            "ETag": f'"{repository.sha256(name) or repository.git_sha1(name)}"',
            "X-Linked-Size": str(len(repository.listed[name])),
            "Accept-Ranges": "bytes",
        }
        data = repository.served[name]
        if self.command == "GET":
            self.hub.downloads.append(name)
            self.hub.gate.wait(60)
        self._send(200, data, headers)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match and status == 200:
            status, start = 206, int(match[1])
            headers = headers | {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            body = body[start:]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)
