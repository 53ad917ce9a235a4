"""Fetching a model from the Hugging Face hub on purpose: what there is, whether it fits, and whether it arrived whole.

`resolve_model` fetches silently what a server needs; this looks first, reports bytes as they come, and compares what
lies on the disk with what the hub says about it. Torch-free.
"""

from __future__ import annotations

import fnmatch
import hashlib
import inspect
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..spec import ModelError
from .resolve import HUB_IGNORED, HUB_PATTERNS, HubName, ModelFiles, hub_error, resolve_model

_CHUNK_BYTES = 1 << 22
_SPARE_BYTES = 64 * 2**20
"""Left free on the disk beyond the model itself."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file, as the hub describes it."""

    name: str
    num_bytes: int | None
    """None where the hub does not say."""
    sha256: str | None
    """Of the content: large files (LFS) have it."""
    git_sha1: str | None
    """Of the content as a git blob: the other files have it."""


@dataclass(frozen=True, slots=True)
class HubModel:
    """The files of a name that make up a model, at one commit."""

    name: HubName
    commit: str
    files: tuple[HubFile, ...]

    def path(self, file: HubFile) -> Path:
        """Where the file lies in the cache, once it is there."""
        return _storage(self.name.repo) / "snapshots" / self.commit / file.name


def look_up(name: HubName) -> HubModel | None:
    """What the hub has under that name; None if the hub cannot be asked (no network, offline mode).

    Raises ModelError for a name that it does not have or does not give out, or that holds no model to serve.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise hub_error(name.label, error) from error
    try:
        info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
    # ValueError: an id that none can have; the others: an answer that is not the hub's.
    except (HfHubHTTPError, ValueError, TypeError, KeyError) as error:
        raise hub_error(name.label, error) from error
    except Exception:  # no way to the hub, in the words of whichever HTTP library huggingface_hub uses
        return None
    files = [_hub_file(sibling) for sibling in info.siblings or ()]
    return HubModel(name, str(info.sha), tuple(_wanted(name, files)))


def _hub_file(sibling: Any) -> HubFile:
    size = sibling.size if type(sibling.size) is int else None
    sha256 = sibling.lfs["sha256"] if sibling.lfs else None
    return HubFile(sibling.rfilename, size, sha256, None if sha256 else sibling.blob_id)


def _wanted(name: HubName, files: list[HubFile]) -> list[HubFile]:
    gguf_names = [file.name for file in files if file.name.endswith(".gguf")]
    if name.file is not None:
        found = [file for file in files if file.name == name.file]
        if not found:
            has = f"it has {_some(gguf_names)}" if gguf_names else "it has no .gguf file at all"
            raise ModelError(f"cannot fetch {name.label}: the repository has no such file; {has}")
        return found
    wanted = [file for file in files if _matches(file.name, HUB_PATTERNS) and not _matches(file.name, HUB_IGNORED)]
    names = {file.name for file in wanted}
    if "config.json" in names and any(file.endswith(".safetensors") for file in names):
        return wanted
    if gguf_names:
        raise ModelError(f"{name.label} holds GGUF files; name one of them behind a colon: {_some(gguf_names)}")
    if any(file.name.endswith(".bin") for file in files):
        raise ModelError(
            f"{name.label} holds pickled weights (.bin), which are never loaded; choose one with safetensors"
        )
    raise ModelError(f"{name.label} has no config.json with safetensors; choose a repository of a language model")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def _storage(repo: str) -> Path:
    """The repository's folder in the hub's cache, whose layout is documented and shared by its tools."""
    return _cache() / ("models--" + repo.replace("/", "--"))


def missing_files(model: HubModel) -> list[HubFile]:
    """What still has to be downloaded. Another commit's copy of the same content counts as there."""
    blobs = _storage(model.name.repo) / "blobs"

    def is_there(file: HubFile) -> bool:
        digest = file.sha256 or file.git_sha1
        return model.path(file).exists() or (digest is not None and (blobs / digest).exists())

    return [file for file in model.files if not is_there(file)]


def require_space(name: HubName, files: Iterable[HubFile]) -> None:
    """Raises ModelError if the cache's disk has less room than the files need."""
    needed = sum(file.num_bytes or 0 for file in files)
    place = _cache()
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed and needed + _SPARE_BYTES > free:
        raise ModelError(
            f"cannot fetch {name.label}: it needs {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free in "
            f"{place}; make room, or set HF_HOME to a place on a larger disk"
        )


def download(model: HubModel, files: Iterable[HubFile], advance: Callable[[int], None]) -> None:
    """Fetch files into the hub's cache, one after the other; `advance` gets the bytes as they arrive.

    A file is in the cache only once it is complete, so an interrupted pull goes on with the file it was at. Raises
    ModelError.
    """
    from huggingface_hub import hf_hub_download

    options: dict[str, Any] = {}
    # Older versions of the library draw a bar of their own for each file, and cannot be told otherwise.
    if "tqdm_class" in inspect.signature(hf_hub_download).parameters:
        options["tqdm_class"] = _bar_class(advance)
    for file in files:
        try:
            hf_hub_download(model.name.repo, file.name, revision=model.commit, **options)
        except Exception as error:
            raise hub_error(model.name.label, error) from error


def settle(model: HubModel) -> ModelFiles:
    """The fetched model, found in the way in which `octavo serve` will find it.

    That way also notes in the cache which commit the name stands for, without which nothing is found offline. Raises
    ModelError.
    """
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # there is nothing left to fetch
    files = resolve_model(model.name.label)
    if model.commit not in files.path.parts:
        raise ModelError(f"{model.name.label} was changed on the hub while it was fetched; pull again")
    return files


def _bar_class(advance: Callable[[int], None]) -> type:
    """What the hub's library takes for a tqdm bar, passing on the bytes written."""

    class Bar:
        def __init__(self, *_: Any, total: int | None = None, **__: Any) -> None:
            self.total = total

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, num_bytes: float | None = 1) -> None:
            advance(int(num_bytes or 0))

        def update_transfer(self, num_bytes: float | None = 1) -> None:
            """Bytes on the wire, which compression makes fewer than those written: not counted."""

        def set_postfix_str(self, *_: Any, **__: Any) -> None:
            pass

        set_transfer_postfix_str = set_description = set_description_str = refresh = close = set_postfix_str

    return Bar


def check_size(model: HubModel, file: HubFile) -> None:
    """Raises ModelError if the file in the cache has not the size that the hub states."""
    path = model.path(file)
    size = path.stat().st_size
    if file.num_bytes is not None and size != file.num_bytes:
        raise _damaged(path, f"has {size} bytes, and the hub says {file.num_bytes}")


def check_digest(path: Path, sha256: str | None, git_sha1: str | None, advance: Callable[[int], None]) -> bool:
    """Hash a whole file, and compare; `advance` gets the bytes read. False if there is nothing to compare with.

    Raises ModelError if they differ.
    """
    if sha256 is None and git_sha1 is None:
        return False
    try:
        hasher = hashlib.sha256() if sha256 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                hasher.update(chunk)
                advance(len(chunk))
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; check that the file may be read") from error
    if hasher.hexdigest() != (sha256 or git_sha1):
        raise _damaged(path, "is not what the hub has: its hash differs")
    return True


def cached_digests(path: Path) -> tuple[str | None, str | None]:
    """The sha256 or the git sha1 that the hub's cache has for one of its files, in the name of the blob behind it.

    (None, None) for a file that is not from the cache. This needs no network.
    """
    blob = path.resolve()
    if blob.parent.name != "blobs" or not blob.parent.parent.name.startswith("models--"):
        return None, None
    sha256 = blob.name if re.fullmatch(r"[0-9a-f]{64}", blob.name) else None
    return sha256, blob.name if re.fullmatch(r"[0-9a-f]{40}", blob.name) else None


def _damaged(path: Path, what: str) -> ModelError:
    # The blob behind the link: with the link alone deleted, the damaged blob would be linked again.
    return ModelError(f"{path.name} {what}; delete {path.resolve()} and pull again")
