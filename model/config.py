"""What a user decides about the model: one frozen slice of the engine's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]
LoadFormat = Literal["auto", "dummy"]
ModelImpl = Literal["auto", "native", "generic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    path: str
    """A local .gguf file or a directory with config.json and safetensors (see weights/resolve.py for names)."""
    load_format: LoadFormat = "auto"
    """dummy: random weights, of which config.json alone says the shapes (weights/dummy.py)."""
    model_impl: ModelImpl = "auto"
    """What computes it. native: a family here; generic: transformers' own code (model/generic); auto: a family where
    there is one."""
    dtype: DType = "auto"
    """Type of activations and K/V. auto: see `resolve_dtype`."""
    device: Device = "auto"
    max_model_len: int | None = None
    """Prompt and output tokens of one sequence at most. None: what the model was trained for, fitted to the pool."""
    kernel_backend: str = "auto"
    seed: int = 0
    """Seeds the requests that bring none of their own."""
