"""The one place that decides how a model's weights are read."""

from __future__ import annotations

from ..config import LoadFormat, ModelImpl
from ..spec import ModelError, ModelSpec
from .dummy import DummySource, open_dummy
from .gguf_source import GgufSource, open_gguf
from .resolve import resolve_model
from .safetensors_source import SafetensorsSource, open_safetensors


def open_weights(
    path: str, load_format: LoadFormat = "auto", model_impl: ModelImpl = "auto"
) -> GgufSource | SafetensorsSource | DummySource:
    """Open a .gguf file, a directory with config.json and safetensors, or whatever else `resolve_model` accepts; under
    `load_format` "dummy", a directory with config.json, whose weights are then random, and the same every time.

    `model_impl`: what is to compute the model. All sources satisfy `WeightSource`. Raises ModelError.
    """
    if load_format == "dummy":
        return open_dummy(resolve_model(path, needs_weights=False).path, model_impl)
    files = resolve_model(path)
    if files.kind != "gguf":
        return open_safetensors(files.path, model_impl)
    if model_impl == "generic":
        raise ModelError(f"{files.path.name}: the generic path reads safetensors only; leave model-impl out")
    return open_gguf(files.path)


def read_spec(path: str) -> ModelSpec:
    """The shape of what `open_weights` would open; the files are closed again. Raises ModelError."""
    source = open_weights(path)
    try:
        return source.spec
    finally:
        source.close()
