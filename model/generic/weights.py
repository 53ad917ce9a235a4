"""From a checkpoint to transformers' module, by transformers' own rules of names and shapes.

transformers 5 renames, merges and splits the tensors of many checkpoints as it loads them (experts that a file keeps
one by one become one tensor), and ties and initialises what no file holds. All of that is left to it: it gets tensors
that are read when it asks, from our source, so that shards, quantised files and random weights are as for any family.
The same procedure over shapes alone checks a checkpoint before anything is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from ..spec import ModelError
from ..weights.source import WeightSource
from .module import build_module, count_parameters


class _Shape:
    """A tensor of a checkpoint that is only compared: what transformers' loader slices to read it."""

    def __init__(self, source: WeightSource, name: str, dtype: torch.dtype) -> None:
        self._shape, self._dtype = tuple(source.weight(name).shape), dtype

    def __getitem__(self, _: Any) -> torch.Tensor:
        return torch.empty(self._shape, dtype=self._dtype, device="meta")


class _Values:
    """A tensor of a checkpoint, read when transformers' loader slices it."""

    def __init__(self, source: WeightSource, name: str, dtype: torch.dtype, read: Callable[[], None]) -> None:
        self._weight, self._dtype, self._read = source.weight(name), dtype, read

    def __getitem__(self, _: Any) -> torch.Tensor:
        values = self._weight.dequantize(self._dtype)
        self._read()
        return values


def check(source: WeightSource) -> int:
    """Compare a checkpoint's headers with what transformers' module needs; returns the number of parameters, tied ones
    counted once. Raises ModelError, in one line."""
    spec = source.spec
    assert spec.transformers_config is not None
    module = build_module(spec.architecture, spec.transformers_config, torch.float32)
    num_parameters = count_parameters(module)
    _load(module, {name: _Shape(source, name, torch.float32) for name in source.names()}, torch.device("meta"))
    return num_parameters


def fill(module: Any, source: WeightSource, device: torch.device, progress: Callable[[float], None]) -> None:
    """Give a module of the meta device its weights. `progress` gets the share of the tensors that were read."""
    names = list(source.names())
    num_read = 0

    def read() -> None:
        nonlocal num_read
        num_read += 1
        progress(num_read / len(names))

    dtype = next(module.parameters()).dtype
    _load(module, {name: _Values(source, name, dtype, read) for name in names}, device)


def _load(module: Any, tensors: dict[str, Any], device: torch.device) -> None:
    config = LoadStateDictConfig(
        device_map={"": device},
        dtype=next(module.parameters()).dtype,
        dtype_plan=module._get_dtype_plan(next(module.parameters()).dtype),
        weight_mapping=get_model_conversion_mapping(module),
        ignore_mismatched_sizes=True,  # reported below
    )
    found, _ = convert_and_load_state_dict_in_model(module, tensors, config)
    PreTrainedModel._finalize_model_loading(module, config, found)
    architecture = type(module).__name__
    if found.missing_keys:
        raise ModelError(
            f"the checkpoint lacks tensor {_first(found.missing_keys)}; it is incomplete, or its config names the "
            "wrong model"
        )
    if found.unexpected_keys:
        raise ModelError(
            f"the checkpoint holds tensor {_first(found.unexpected_keys)}, which is not part of a {architecture}; "
            "this variant of the model is not supported"
        )
    for name, stored, wanted in sorted(found.mismatched_keys):
        raise ModelError(
            f"tensor {name} has shape {list(stored)}, but the config asks for {list(wanted)}; "
            "config and weights do not belong together"
        )
    if found.conversion_errors:
        name, error = sorted(found.conversion_errors.items())[0]
        raise ModelError(f"tensor {name} cannot be made of the checkpoint's: {' '.join(str(error).split())[:160]}")


def _first(names: set[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{min(names)[:100]}{more}"


def parameter_shapes(module: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Of every parameter by transformers' own name, tied ones once."""
    tied = set(module.all_tied_weights_keys)
    return [(name, tuple(value.shape)) for name, value in module.named_parameters() if name not in tied]
