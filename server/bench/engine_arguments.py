"""Arguments of the measurements that load a model in this process: which engine, lists of sizes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..options import OptionError, add_group, given, resolve_options

if TYPE_CHECKING:
    from ...model.config import ModelConfig

_ENGINE_OPTIONS = ("model", "device", "dtype", "kernel_backend", "block_size")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of `octavo serve` that decide how fast one step is, from the same table."""
    add_group(parser, "engine", _ENGINE_OPTIONS)


def engine_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """The engine's settings from the command line, the environment and the config file. Raises OptionError."""
    values = resolve_options(given(arguments, _ENGINE_OPTIONS))
    return {name: values[name] for name in _ENGINE_OPTIONS}


def model_config(values: Mapping[str, Any], path: str, max_model_len: int | None = None) -> ModelConfig:
    """`values` as `engine_values` returns them, `path` as `resolve_model` found it."""
    from ...model.config import ModelConfig

    return ModelConfig(
        path=path,
        dtype=values["dtype"],
        device=values["device"],
        max_model_len=max_model_len,
        kernel_backend=values["kernel_backend"],
    )


def parse_number(text: str, flag: str, low: int, high: int = 2**31 - 1) -> int:
    """Raises OptionError."""
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise OptionError(f"{flag}: expected a whole number from {low} to {high} (given: {text[:80]!r})")
    return value


def parse_numbers(text: str, flag: str, low: int, high: int = 2**31 - 1) -> list[int]:
    """Numbers between commas, each once, ascending. Raises OptionError."""
    try:
        values = {int(part) for part in text.split(",")}
    except ValueError:
        values = {low - 1}
    if min(values) < low or max(values) > high:
        raise OptionError(f"{flag}: expected whole numbers from {low} to {high} between commas (given: {text[:80]!r})")
    return sorted(values)
