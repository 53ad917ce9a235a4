"""The one place that decides how a model's weights are read."""

from __future__ import annotations

from ..spec import ModelSpec
from .gguf_source import GgufSource, open_gguf
from .resolve import resolve_model
from .safetensors_source import SafetensorsSource, open_safetensors


def open_weights(path: str) -> GgufSource | SafetensorsSource:
    """Open a .gguf file, a directory with config.json and safetensors, or whatever else `resolve_model` accepts.

    Both sources satisfy `WeightSource`. Raises ModelError.
    """
    files = resolve_model(path)
    return open_gguf(files.path) if files.kind == "gguf" else open_safetensors(files.path)


def read_spec(path: str) -> ModelSpec:
    """The shape of what `open_weights` would open; the files are closed again. Raises ModelError."""
    source = open_weights(path)
    try:
        return source.spec
    finally:
        source.close()
