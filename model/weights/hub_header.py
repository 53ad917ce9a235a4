"""What a plan needs of a model on the Hugging Face hub: config.json, or the header of a GGUF file; never weights."""

from __future__ import annotations

from pathlib import Path

from ..spec import ModelError
from .gguf_file import GgufFile
from .resolve import HubName, hub_error

_FIRST_BYTES = 2**20
_MOST_BYTES = 2**28
"""Of a GGUF file's beginning. The largest headers, of vocabularies of 10⁵ pieces, take some 10⁷."""


def fetch_config(hub: HubName) -> Path:
    """config.json alone, in the hub's cache. Raises ModelError."""
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(hub.repo, "config.json", revision=hub.revision))
    except Exception as error:
        mend = ModelError(f"cannot plan {hub.label}: the repository has no config.json; name one of its .gguf files")
        raise mend if _has_no_entry(error) else hub_error(hub.label, error) from error


def _has_no_entry(error: Exception) -> bool:
    from huggingface_hub import errors

    return isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError)


def fetch_gguf_header(hub: HubName, file: str, folder: Path) -> Path:
    """A file of the true size that holds the header, and nothing (a hole) where tensors would be; in `folder`, or the
    whole file where the hub's cache has it. Raises ModelError.

    The ordinary parser then reads it with all its checks, those against the file's size included.
    """
    try:
        from huggingface_hub import HfFileSystem, try_to_load_from_cache

        cached = try_to_load_from_cache(hub.repo, file, revision=hub.revision)
        if isinstance(cached, str):
            return Path(cached)
        target = folder / Path(file).name
        with HfFileSystem().open(f"{hub.repo}/{file}", "rb", revision=hub.revision, cache_type="none") as remote:
            _copy_header(remote, int(remote.size), target)
    except ModelError:
        raise
    except FileNotFoundError as error:
        raise ModelError(
            f"cannot fetch {hub.label}: the hub has no such file, revision or repository, or it is private; check the "
            "name or set HF_TOKEN"
        ) from error
    except Exception as error:
        raise hub_error(hub.label, error) from error
    return target


def _copy_header(remote: object, size: int, target: Path) -> None:
    """Fetch twice as much until the parser is content with what it has read."""
    fetched, wanted = 0, _FIRST_BYTES
    with target.open("wb") as local:
        local.truncate(size)
        while True:
            wanted = min(wanted, size)
            remote.seek(fetched)  # type: ignore[attr-defined]
            local.seek(fetched)
            local.write(remote.read(wanted - fetched))  # type: ignore[attr-defined]
            local.flush()
            fetched = wanted
            if _is_whole(target, fetched, last=fetched == size or fetched >= _MOST_BYTES):
                return
            wanted *= 2


def _is_whole(path: Path, fetched: int, *, last: bool) -> bool:
    """Whether the header ends within the first `fetched` bytes. Beyond them the parser reads zeros, and may fail on
    them or go on; at the `last` try its failure stands."""
    with path.open("rb") as local:
        last = last or local.read(4) != b"GGUF"
    try:
        file = GgufFile(path)
    except ModelError:
        if last:
            raise
        return False
    file.close()
    if file.header_bytes > fetched and last:
        raise ModelError(f"{path.name}: the header takes more than {fetched} bytes; choose another file")
    return file.header_bytes <= fetched
