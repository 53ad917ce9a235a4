"""The sampling defaults that a model's makers recommend. Torch-free."""

from __future__ import annotations

import math
from typing import Any

from .gguf_file import GgufFile
from .jsonfile import read_optional_json_object
from .resolve import ModelFiles

_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_GGUF_NAMES = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def read_generation_defaults(files: ModelFiles) -> dict[str, float]:
    """Recommended temperature, top_p, top_k, min_p and repetition_penalty: those that the model states.

    From generation_config.json, or a GGUF's general.sampling.* metadata; usually {} for a GGUF. Values out of the
    parameter's range are left out: they are advice, and bad advice must not stop a model. Raises ModelError where the
    files cannot be read.
    """
    if files.kind == "hf":
        stated = read_optional_json_object(files.path / "generation_config.json")
        return _usable({name: stated.get(name) for name in _NAMES})
    file = GgufFile(files.path)
    try:
        return _usable({name: file.metadata.get(key) for key, name in _GGUF_NAMES.items()})
    finally:
        file.close()


def _usable(stated: dict[str, Any]) -> dict[str, float]:
    defaults: dict[str, float] = {}
    for name, value in stated.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            continue
        upper = 1.0 if name in ("top_p", "min_p") else math.inf
        if 0 <= value <= upper and not (value == 0 and name in ("top_p", "repetition_penalty")):
            defaults[name] = float(value)
    return defaults
