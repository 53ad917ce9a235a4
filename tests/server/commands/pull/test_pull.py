"""`octavo pull`, against a hub of its own: what is fetched, what is checked, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub
from octavo.model.spec import ModelError
from octavo.model.weights.open import open_weights
from octavo.server.options import OptionError
from octavo.server.pull import Pulled, pull_model, report
from weight_files import write_llama_gguf

WANTED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


def pull(name: str | None, *, verify: bool | None = None) -> Pulled:
    return pull_model(name, verify=verify)


def refused(name: str, *, verify: bool | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        pull(name, verify=verify)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def start_octavo(*arguments: str, hub: FakeHub, home: Path) -> subprocess.Popen[str]:
    """The command as a user runs it."""
    command = Path(sys.executable).with_name("octavo")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "OCTAVO_"))}
    environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen([str(command), "pull", *arguments], stdout=pipe, stderr=pipe, text=True, env=environ)


def octavo(*arguments: str, hub: FakeHub, home: Path) -> subprocess.CompletedProcess[str]:
    with start_octavo(*arguments, hub=hub, home=home) as process:
        out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_the_command_fetches_checks_and_says_what_to_do_next(hub: FakeHub, tmp_path: Path) -> None:
    first = octavo("tiny/llama", hub=hub, home=tmp_path)
    assert first.returncode == 0, first.stderr
    assert set(hub.downloads) == WANTED
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in first.stdout.splitlines() if line.startswith("  ")}
    folder = Path(lines["where"])
    assert folder.is_relative_to(tmp_path)
    assert lines["architecture"].startswith("LlamaForCausalLM, ")
    assert lines["checked"] == "size of 4 files; hash of 4 files; headers and tensors"
    assert lines["next"] == "octavo serve tiny/llama"
    source = open_weights(str(folder))
    assert "model.layers.1.self_attn.q_proj.weight" in source.names()
    source.close()

    # Again without the hub: the name is still known, and what it stands for is still whole.
    asked = hub.num_requests
    offline = octavo("--offline", "--verify", "tiny/llama", hub=hub, home=tmp_path)
    assert offline.returncode == 0, offline.stderr
    assert "hash of 4 files" in offline.stdout
    assert hub.num_requests == asked


def test_mistakes_of_the_command_line_are_one_line_and_a_status(hub: FakeHub, tmp_path: Path) -> None:
    done = octavo("tiny/missing", hub=hub, home=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("octavo: cannot fetch tiny/missing: the hub has no such repository")
    assert done.stderr.count("\n") == 1


def test_ctrl_c_ends_a_pull_with_one_line(hub: FakeHub, tmp_path: Path) -> None:
    hub.gate.clear()
    with start_octavo("tiny/llama", hub=hub, home=tmp_path) as process:
        hub.wait_for_download()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].startswith("octavo: stopped; files that are complete are kept")
    assert "Traceback" not in err


def test_a_second_pull_fetches_nothing(hub_here: FakeHub) -> None:
    first = pull("tiny/llama")
    count = len(hub_here.downloads)
    assert count == len(WANTED)
    second = pull("tiny/llama")
    assert len(hub_here.downloads) == count
    assert second.files == first.files
    assert second.checks == ("size of 4 files", "headers and tensors")
    assert pull("tiny/llama", verify=True).checks == ("size of 4 files", "hash of 4 files", "headers and tensors")


def test_only_what_is_missing_is_fetched(hub_here: FakeHub) -> None:
    folder = pull("tiny/llama").files.path
    blob = (folder / "tokenizer.json").resolve()
    (folder / "tokenizer.json").unlink()
    blob.unlink()
    hub_here.downloads.clear()
    assert pull("tiny/llama").checks[1] == "hash of 1 file"
    assert hub_here.downloads == ["tokenizer.json"]


def test_a_changed_readme_costs_no_second_download(hub_here: FakeHub, tiny_llama: dict[str, bytes]) -> None:
    first = pull("tiny/llama").files.path
    hub_here.downloads.clear()
    hub_here.add("tiny/llama", tiny_llama | {"README.md": b"# changed"})
    second = pull("tiny/llama").files.path
    assert second != first
    assert hub_here.downloads == []


def test_content_that_differs_from_the_hubs_hash_is_refused(hub_here: FakeHub) -> None:
    served = hub_here.repositories["tiny/llama"].served
    data = bytearray(served["model.safetensors"])
    data[-1] ^= 1
    served["model.safetensors"] = bytes(data)
    message = refused("tiny/llama")
    assert message.startswith("model.safetensors is not what the hub has")
    assert "pull again" in message
    # Deleting what the message names, and nothing else, mends it.
    blob = Path(message.split("delete ")[1].removesuffix(" and pull again"))
    blob.unlink()
    served["model.safetensors"] = hub_here.repositories["tiny/llama"].listed["model.safetensors"]
    assert pull("tiny/llama").contents.refusal is None


def test_a_small_file_is_checked_by_its_git_hash(hub_here: FakeHub) -> None:
    hub_here.repositories["tiny/llama"].served["tokenizer.json"] = b"[]"
    assert refused("tiny/llama").startswith("tokenizer.json is not what the hub has")


def test_damage_on_the_disk_is_found_when_asked_for(hub_here: FakeHub) -> None:
    blob = (pull("tiny/llama").files.path / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    pull("tiny/llama")  # hashes only what it fetched
    assert "its hash differs" in refused("tiny/llama", verify=True)


def test_a_file_of_the_wrong_size_is_refused(hub_here: FakeHub) -> None:
    blob = (pull("tiny/llama").files.path / "model.safetensors").resolve()
    size = blob.stat().st_size
    with blob.open("r+b") as file:
        file.truncate(size - 10)
    message = refused("tiny/llama")
    assert message.startswith(f"model.safetensors has {size - 10} bytes, and the hub says {size}; delete {blob}")


def test_a_download_that_ends_early_is_refused(hub_here: FakeHub) -> None:
    served = hub_here.repositories["tiny/llama"].served
    served["model.safetensors"] = served["model.safetensors"][:-10]
    assert refused("tiny/llama").startswith("cannot fetch tiny/llama: ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny/missing", "no such repository, or it is private"),
        ("tiny/llama@nope", "no such revision"),
        ("tiny/llama:model.gguf", "no such file; it has no .gguf file at all"),
        ("tiny/gguf", "holds GGUF files; name one of them behind a colon: a.gguf, b.gguf"),
        ("tiny/gguf:c.gguf", "no such file; it has a.gguf, b.gguf"),
        ("tiny/pickled", "pickled weights"),
        ("tiny/empty", "no config.json with safetensors"),
        ("tiny/gated", "access is restricted"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(
    hub_here: FakeHub, tiny_llama: dict[str, bytes], name: str, message: str
) -> None:
    hub_here.add("tiny/gguf", {"a.gguf": b"GGUF", "b.gguf": b"GGUF"})
    hub_here.add("tiny/pickled", {"config.json": b"{}", "pytorch_model.bin": b""})
    hub_here.add("tiny/empty", {"README.md": b""})
    hub_here.add("tiny/gated", tiny_llama).gated = True
    assert message in refused(name)
    assert hub_here.downloads == []


def test_a_name_that_a_terminal_would_act_on_is_made_harmless(hub_here: FakeHub, tiny_llama: dict[str, bytes]) -> None:
    config = json.loads(tiny_llama["config.json"]) | {"architectures": ["Evil\x1b]0;owned\x07"]}
    hub_here.add("tiny/evil", tiny_llama | {"config.json": json.dumps(config).encode()})
    text = report(pull("tiny/evil"), "tiny/evil")
    assert "architecture  Evil]0;owned\n" in text
    assert "the model's architecture Evil]0;owned is not supported" in text
    assert "\x1b" not in text


def test_a_commit_can_be_named(hub_here: FakeHub) -> None:
    commit = hub_here.repositories["tiny/llama"].commit
    assert pull(f"tiny/llama@{commit}").files.name == f"tiny/llama@{commit}"


def test_one_gguf_file_of_a_repository(hub_here: FakeHub, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_llama_gguf(path)
    hub_here.add("tiny/gguf", {"tiny.gguf": path.read_bytes(), "other.gguf": b"GGUF"})
    pulled = pull("tiny/gguf:tiny.gguf")
    assert hub_here.downloads == ["tiny.gguf"]
    assert pulled.files.kind == "gguf"
    assert pulled.contents.architecture == "LlamaForCausalLM"
    assert "octavo serve tiny/gguf:tiny.gguf" in report(pulled, "tiny/gguf:tiny.gguf")


def test_an_unknown_architecture_is_pulled_and_said_not_to_be_served(
    hub_here: FakeHub, tiny_llama: dict[str, bytes]
) -> None:
    config = json.loads(tiny_llama["config.json"]) | {"architectures": ["NobodysForCausalLM"]}
    hub_here.add("tiny/other", tiny_llama | {"config.json": json.dumps(config).encode()})
    pulled = pull("tiny/other")
    assert pulled.checks[-1] == "headers"
    text = report(pulled, "tiny/other")
    assert "this release cannot serve it: the model's architecture NobodysForCausalLM is not supported" in text
    assert "octavo serve" not in text


def test_a_model_that_lacks_a_tensor_is_refused(hub_here: FakeHub, tiny_llama: dict[str, bytes]) -> None:
    config = json.loads(tiny_llama["config.json"]) | {"num_hidden_layers": 3}
    hub_here.add("tiny/short", tiny_llama | {"config.json": json.dumps(config).encode()})
    assert "the checkpoint lacks tensor model.layers.2." in refused("tiny/short")


def test_a_full_disk_is_noticed_before_anything_is_fetched(hub_here: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    message = refused("tiny/llama")
    assert "0.00 GiB are free" in message
    assert "HF_HOME" in message
    assert hub_here.downloads == []


def test_an_unreachable_hub_leaves_what_the_cache_holds(
    hub_here: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    first = pull("tiny/llama")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pull("tiny/llama").files == first.files
    assert "the hub was not asked" in capsys.readouterr().out
    assert "cannot be reached" in refused("tiny/other")


def test_a_path_is_only_checked(tmp_path: Path, tiny_llama: dict[str, bytes]) -> None:
    for name, data in tiny_llama.items():
        if "/" not in name:
            (tmp_path / name).write_bytes(data)
    assert pull(str(tmp_path)).checks == ("headers and tensors",)
    with pytest.raises(OptionError, match="--verify"):
        pull(str(tmp_path), verify=True)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(len(tiny_llama["model.safetensors"]) - 10)
    assert "damaged or incomplete" in refused(str(tmp_path))


class FakePackage:
    """What importlib.metadata tells of the default model's package."""

    def __init__(self, path: Path, digest: bytes) -> None:
        self._path = path
        self.hash: Any = type("Hash", (), {})()
        self.hash.mode = "sha256"
        self.hash.value = base64.urlsafe_b64encode(digest).decode().rstrip("=")

    @property
    def files(self) -> list[FakePackage]:
        return [self]

    def locate(self) -> Path:
        return self._path


def test_the_default_model_is_checked_against_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import octavo.model.weights.resolve as resolve
    import octavo.server.pull as module

    folder = tmp_path / "nobodys_model"
    folder.mkdir()
    path = folder / "tiny.gguf"
    write_llama_gguf(path)
    (folder / "__init__.py").write_text("raise RuntimeError('never imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(resolve, "DEFAULT_PACKAGE", "nobodys_model")
    digest = hashlib.sha256(path.read_bytes()).digest()
    monkeypatch.setattr(module.importlib.metadata, "distribution", lambda _: FakePackage(path, digest))
    pulled = pull(None)
    assert pulled.checks == ("hash, as its package lists it", "headers and tensors")
    assert report(pulled, None).endswith("octavo serve")
    monkeypatch.setattr(module.importlib.metadata, "distribution", lambda _: FakePackage(path, b"\0" * 32))
    with pytest.raises(ModelError, match="pip install --force-reinstall"):
        pull(None)
    assert pull(None, verify=False).checks == ("headers and tensors",)
