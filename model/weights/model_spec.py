"""Which code computes a directory's model, and its shape for that code."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ..config import ModelImpl
from ..registry import is_native, model_family
from ..spec import ModelSpec
from .hf_config import HfConfig
from .hf_spec import read_hf_spec
from .jsonfile import read_json_object


def read_model_spec(directory: Path, tensor_names: Collection[str] | None, model_impl: ModelImpl) -> ModelSpec:
    """Of a directory with config.json; `tensor_names` as for `read_hf_spec`. Raises ModelError."""
    path = directory / "config.json"
    config = HfConfig(path, read_json_object(path))
    architecture = config.architecture
    if architecture != "unknown" and model_impl == "native":
        model_family(architecture)
    if architecture == "unknown" or model_impl == "native" or (model_impl == "auto" and is_native(architecture)):
        return read_hf_spec(directory, tensor_names)
    from ..generic.describe import read_generic_spec  # imports transformers, which takes seconds

    return read_generic_spec(directory, config.values, architecture)
