"""The tokenizer of a Hugging Face directory: tokenizer.json and the small files around it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ..model.spec import ModelError
from ..model.weights.hf_spec import read_eos_ids
from ..model.weights.jsonfile import read_optional_json_object

# Vocabularies from before tokenizer.json, which transformers knows how to convert.
_SLOW_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "spiece.model", "vocab.txt")
_CONVERT_TIMEOUT_S = 600
MAX_TEMPLATE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class HfTokenizer:
    """What the directory says about text."""

    backend: Tokenizer
    bos_token_id: int | None
    eos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    add_bos: bool | None
    """What tokenizer_config.json says; None where it says nothing."""
    chat_template: str | None


def load_hf_tokenizer(directory: Path) -> HfTokenizer:
    """Raises ModelError where the directory has no tokenizer, or a damaged one."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        path = _converted(directory)
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(
            f"{directory.name}/tokenizer.json cannot be read ({str(error)[:120]}); download it again, "
            "or upgrade `tokenizers`"
        ) from error
    config = read_optional_json_object(directory / "tokenizer_config.json")
    names = {**read_optional_json_object(directory / "special_tokens_map.json"), **config}
    _add_missing_tokens(backend, config)
    bos, eos = _content(names.get("bos_token")), _content(names.get("eos_token"))
    eos_token_id = backend.token_to_id(eos) if eos is not None else None
    eos_ids = ([] if eos_token_id is None else [eos_token_id]) + list(read_eos_ids(directory))
    add_bos = config.get("add_bos_token")
    return HfTokenizer(
        backend=backend,
        bos_token_id=backend.token_to_id(bos) if bos is not None else None,
        eos_token_id=eos_token_id,
        eos_token_ids=tuple(dict.fromkeys(eos_ids)),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        chat_template=_chat_template(directory, config),
    )


def _content(token: Any) -> str | None:
    """A token is given as text, or as an object with its text and flags."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _add_missing_tokens(backend: Tokenizer, config: dict[str, Any]) -> None:
    """Tokens that fine-tuning added to tokenizer_config.json alone; only where they get the ids listed there."""
    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        return
    known = ((key, value) for key, value in listed.items() if key.isdecimal() and isinstance(value, dict))
    entries = [(int(key), value) for key, value in known]
    for token_id, value in sorted(entries, key=lambda entry: entry[0]):
        content = _content(value)
        if content and backend.token_to_id(content) is None and token_id == backend.get_vocab_size():
            flags = {name: value.get(name) is True for name in ("single_word", "lstrip", "rstrip", "normalized")}
            token = AddedToken(content, special=value.get("special") is True, **flags)
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja wins over the config, as in transformers; of several named ones, "default"."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise ModelError(f"{directory.name}/chat_template.jinja is over {MAX_TEMPLATE_BYTES} bytes; replace it")
        return path.read_text(encoding="utf-8", errors="replace")
    template = config.get("chat_template")
    if template is None:
        template = read_optional_json_object(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def cache_directory() -> Path:
    """Where converted tokenizers are kept: $OCTAVO_CACHE, else ~/.cache/octavo."""
    place = os.environ.get("OCTAVO_CACHE")
    return Path(place) if place else Path.home() / ".cache" / "octavo"


def _converted(directory: Path) -> Path:
    """tokenizer.json made by transformers from an older vocabulary, in a process of its own, and kept."""
    sources = [directory / name for name in _SLOW_FILES if (directory / name).is_file()]
    if not sources:
        raise ModelError(f"{directory} has no tokenizer.json; download the whole model again")
    digest = hashlib.sha256()
    for path in [*sources, directory / "tokenizer_config.json"]:
        digest.update(path.read_bytes() if path.is_file() else b"")
    target = cache_directory() / "tokenizers" / digest.hexdigest()[:32] / "tokenizer.json"
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / "tokenizer.json"
            _convert(directory, made)
            os.replace(made, target)  # whole or not at all, also when two servers start at once
    except OSError as error:
        raise ModelError(
            f"cannot keep the converted tokenizer in {target.parent} ({error.strerror}); set OCTAVO_CACHE to a "
            "writable directory"
        ) from error
    return target


def _convert(directory: Path, target: Path) -> None:
    # -P: transformers looks for a module named `kernels`, which the current directory might offer.
    command = [sys.executable, "-P", "-m", f"{__package__}.tokenizer_convert", str(directory), str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CONVERT_TIMEOUT_S, check=False)
        problem = (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else None
    except subprocess.TimeoutExpired:
        problem = f"it took over {_CONVERT_TIMEOUT_S} s"
    if problem is not None or not target.is_file():
        raise ModelError(
            f"{directory.name} has no tokenizer.json, and transformers could not make one ({(problem or '')[:160]}); "
            "save it once with AutoTokenizer(...).save_pretrained, or install sentencepiece and protobuf"
        )
