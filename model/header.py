"""What a model's header alone tells: its shape, its K/V layout, how many parameters it has."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .kv_layout import KvLayout, kv_layout
from .loader import check_weights, stored_weights
from .registry import model_family
from .spec import ModelError, ModelSpec
from .text import printable
from .weights.gguf_families import GGUF_FAMILIES
from .weights.gguf_outline import open_gguf_outline
from .weights.gguf_source import open_gguf
from .weights.hf_outline import read_hf_outline, stored_bytes
from .weights.hf_spec import read_hf_spec
from .weights.hub_header import fetch_config, fetch_gguf_header
from .weights.jsonfile import read_json_object
from .weights.layout import check_spec
from .weights.outline import Outline
from .weights.resolve import HubName, ModelFiles, locate_model
from .weights.safetensors_source import open_safetensors


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelHeader:
    name: str
    """For people: the hub id, or the file's or directory's name."""
    read: str
    """What was read, e.g. "config.json"."""
    spec: ModelSpec
    kv_layout: KvLayout
    num_parameters: int
    weights: tuple[tuple[str, tuple[int, ...]], ...] | None = None
    """Encoding and shape of every tensor. None: not known, and taken for plain floats."""
    stored_bytes: int | None
    """Size of the weights as stored. None: unknown."""
    refusal: str | None = None
    """That `octavo serve` would not take the model, and why; None where it would."""
    notes: tuple[str, ...] = ()


def read_header(name: str | None) -> ModelHeader:
    """Of whatever `octavo serve` takes, and of a config.json without weights, by its path or its directory's.

    Nothing but config.json, or the header of a GGUF file, is fetched from the hub. Raises ModelError where there is no
    such model, or its memory cannot be known.
    """
    directory = _bare_config(name)
    if directory is not None:
        return _of_config(directory, directory.resolve().name)
    found = locate_model(name)
    if isinstance(found, HubName):
        return _of_hub(found)
    if found.kind == "gguf":
        return _of_gguf(found.path, found.name, found.path.stat().st_size)
    return _of_directory(found)


def _bare_config(name: str | None) -> Path | None:
    """The directory of a config.json without safetensors; None where `locate_model` should have its say."""
    if not name:
        return None
    try:
        path = Path(name).expanduser().absolute()
        if path.is_file():
            return path.parent if path.name == "config.json" else None
        bare = (path / "config.json").is_file() and not any(path.glob("*.safetensors")) and not any(path.glob("*.gguf"))
        return path if bare else None
    except (OSError, RuntimeError, ValueError):
        return None


def _of_hub(hub: HubName) -> ModelHeader:
    if hub.file is None:
        return _of_config(fetch_config(hub).parent, hub.label, stored=False)
    with tempfile.TemporaryDirectory(prefix="octavo-plan-") as folder:
        path = fetch_gguf_header(hub, hub.file, Path(folder))
        return _of_gguf(path, hub.label, path.stat().st_size)


def _of_gguf(path: Path, name: str, num_bytes: int) -> ModelHeader:
    read = f"the header of {path.name}"
    try:
        source = open_gguf(path)
        try:
            num_parameters = check_weights(source)
            weights = tuple(stored_weights(source))
        finally:
            source.close()
    except ModelError as error:
        return _unserved(open_gguf_outline(path), str(error), name=name, read=read, num_bytes=num_bytes)
    return ModelHeader(
        name=name,
        read=read,
        spec=source.spec,
        kv_layout=kv_layout(source.spec),
        num_parameters=num_parameters,
        weights=weights,
        stored_bytes=num_bytes,
    )


def _of_directory(files: ModelFiles) -> ModelHeader:
    read = "config.json and the headers of the safetensors"
    try:
        source = open_safetensors(files.path)
        try:
            num_parameters = check_weights(source)
            weights = tuple(stored_weights(source))
        finally:
            source.close()
    except ModelError as error:
        outline = read_hf_outline(files.path, _completed_config(files.path))
        return _unserved(
            _counted(outline, files.path),
            str(error),
            name=files.name,
            read=read,
            num_bytes=stored_bytes(files.path),
        )
    return ModelHeader(
        name=files.name,
        read=read,
        spec=source.spec,
        kv_layout=kv_layout(source.spec),
        num_parameters=num_parameters,
        weights=weights,
        stored_bytes=stored_bytes(files.path),
    )


def _of_config(directory: Path, name: str, *, stored: bool = True) -> ModelHeader:
    """`stored`: whether files beside config.json may tell how large the weights are."""
    num_bytes = stored_bytes(directory) if stored else None
    try:
        spec = read_hf_spec(directory, None)
        check_spec(spec, directory / "config.json")
        parameters = model_family(spec.architecture).parameters(spec)
    except ModelError as error:
        outline = read_hf_outline(directory, _completed_config(directory))
        return _unserved(_counted(outline, directory), str(error), name=name, read="config.json", num_bytes=num_bytes)
    return ModelHeader(
        name=name,
        read="config.json",
        spec=spec,
        kv_layout=kv_layout(spec),
        num_parameters=sum(math.prod(shape) for _, shape in parameters),
        stored_bytes=num_bytes,
    )


def _unserved(outline: Outline, refusal: str, *, name: str, read: str, num_bytes: int | None) -> ModelHeader:
    if outline.num_parameters is None:
        raise ModelError(f"{name}: the parameters cannot be counted from {read}; name files that hold its weights")
    known = _is_known(outline.spec.architecture)
    refused = "octavo serve refuses it" if known else f"this release does not serve {outline.spec.architecture} yet"
    return ModelHeader(
        name=name,
        read=read,
        spec=outline.spec,
        kv_layout=outline.kv_layout,
        num_parameters=outline.num_parameters,
        stored_bytes=num_bytes,
        refusal=printable(f"{refused}: {refusal}"),
        notes=outline.notes,
    )


def _is_known(architecture: str) -> bool:
    """By transformers' name or GGUF's."""
    if architecture in GGUF_FAMILIES:
        return True
    try:
        model_family(architecture)
    except ModelError:
        return False
    return True


def _completed_config(directory: Path) -> dict[str, Any]:
    """The text model's settings with the defaults that transformers has for its type; config.json as it is, where
    transformers does not know the type."""
    raw = read_json_object(directory / "config.json")
    config = _transformers_config(directory)
    if config is not None:
        text_config = config.get_text_config()
        settings: dict[str, Any] = text_config.to_dict()
        # Some architectures name a setting otherwise (GPT-2 has n_layer), and transformers maps the common name to it.
        common = {name: settings[own] for name, own in text_config.attribute_map.items() if own in settings}
        return {**common, **settings}
    text = raw.get("text_config")
    return {**raw, **text} if isinstance(text, dict) else raw


def _transformers_config(directory: Path) -> Any:
    """None where transformers has no such type or finds the settings wrong; code beside a config is never run."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()  # its advice on settings is not for people who plan
    try:
        return AutoConfig.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except Exception:
        return None


def _counted(outline: Outline, directory: Path) -> Outline:
    """With the parameters of the empty model, where no file has told their number."""
    if outline.num_parameters is not None:
        return outline
    return replace(outline, num_parameters=_count_empty_model(directory, outline.spec.architecture))


def _count_empty_model(directory: Path, architecture: str) -> int | None:
    """Parameters of transformers' model on the meta device, which allocates nothing. None: it has no such model."""
    import transformers

    config = _transformers_config(directory)
    model_class = getattr(transformers, architecture, None)
    if config is None or not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
        return None
    # The parameters are those of the model before it was quantised.
    config.quantization_config = None
    try:
        with torch.device("meta"):
            model = model_class(config)
    except Exception:
        return None
    return sum(int(parameter.numel()) for parameter in model.parameters())
