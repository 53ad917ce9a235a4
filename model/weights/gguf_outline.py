"""An `Outline` from a GGUF header of any architecture. Torch-free."""

from __future__ import annotations

import array
import math
from pathlib import Path

from ..spec import ModelError
from ..text import one_line
from .gguf_file import GgufFile
from .layout import check_spec
from .outline import Outline, Sizes, build_outline, checked_num_layers, periodic_windows

_WINDOW_PERIODS = {"cohere2": 4, "gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "llama": 0, "phi3": 0}
"""Which layers are windowed where the header gives the window alone: as llama.cpp has it built in."""
_NO_PARAMETERS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def read_gguf_outline(file: GgufFile) -> Outline:
    """Raises ModelError where the header lacks a number, or the layers keep something other than keys and values."""
    prefix, where = file.get("general.architecture", str, ""), file.path.name
    if not prefix:
        raise ModelError(f"{where}: the metadata lacks general.architecture; convert the model to GGUF again")
    _refuse_other_memory(file, prefix, where)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{where}: there is no token_embd.weight matrix; download the whole model again")
    num_layers = checked_num_layers(file.require(f"{prefix}.block_count"), where)
    hidden_size = file.require(f"{prefix}.embedding_length")
    heads = _per_layer(file, f"{prefix}.attention.head_count", num_layers)
    default_dim = hidden_size // max(1, *heads)
    windows, notes = layer_windows(file, prefix, num_layers)
    sizes = Sizes(
        architecture=one_line(prefix, 60),
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=_intermediate_size(file, prefix, num_layers),
        num_attention_heads=max(heads),
        num_key_value_heads=_per_layer(file, f"{prefix}.attention.head_count_kv", num_layers, heads),
        key_dims=_head_dims(file, f"{prefix}.attention.key_length", windows, default_dim),
        value_dims=_head_dims(file, f"{prefix}.attention.value_length", windows, default_dim),
        windows=windows,
        max_position_embeddings=file.require(f"{prefix}.context_length"),
        tie_word_embeddings="output.weight" not in file.tensors,
        num_reading_layers=file.get(f"{prefix}.attention.shared_kv_layers", int, 0),
    )
    parameters = sum(math.prod(t.shape) for name, t in file.tensors.items() if name not in _NO_PARAMETERS)
    outline = build_outline(sizes, where, parameters, notes)
    check_spec(outline.spec, file.path)
    return outline


def _refuse_other_memory(file: GgufFile, prefix: str, where: str) -> None:
    parts = file.get("split.count", int, 1)
    if parts > 1:
        raise ModelError(f"{where} is one of {parts} parts of a model; merge them with llama-gguf-split --merge first")
    if file.get(f"{prefix}.attention.kv_lora_rank", int, 0):
        raise ModelError(
            f"{where}: {one_line(prefix, 60)} keeps compressed keys and values (multi-head latent attention), whose "
            "size is not known here; choose another model"
        )
    if any(key.startswith((f"{prefix}.ssm.", f"{prefix}.wkv.")) for key in file.metadata):
        raise ModelError(
            f"{where}: {one_line(prefix, 60)} keeps a state instead of keys and values, whose size is not known here; "
            "choose a model whose layers all attend"
        )


def _per_layer(file: GgufFile, key: str, num_layers: int, default: list[int] | None = None) -> list[int]:
    """One number for each layer; a header may give a single one for all."""
    value = file.metadata.get(key)
    if isinstance(value, array.array) and value.typecode not in "fd":
        if len(value) != num_layers:
            raise ModelError(f"{file.path.name}: {key} has {len(value)} entries for {num_layers} layers; convert again")
        return [int(item) for item in value]
    if value is None and default is not None:
        return default
    return [file.require(key)] * num_layers


def _head_dims(file: GgufFile, key: str, windows: list[int | None], default: int) -> list[int]:
    everywhere = file.get(key, int, default)
    windowed = file.get(f"{key}_swa", int, everywhere)
    return [everywhere if window is None else windowed for window in windows]


def _intermediate_size(file: GgufFile, prefix: str, num_layers: int) -> int:
    """The widest product of one token: of a dense layer, or of the experts that a token takes together."""
    dense = max(_per_layer(file, f"{prefix}.feed_forward_length", num_layers, [0]))
    used = file.get(f"{prefix}.expert_used_count", int, 0)
    return max(dense, used * file.get(f"{prefix}.expert_feed_forward_length", int, dense))


_BUILT_IN_WINDOWS = {"gemma2": 4096}
"""Where the header says nothing: files from before the key existed (llama.cpp has this number built in)."""


def layer_windows(file: GgufFile, prefix: str, num_layers: int) -> tuple[list[int | None], tuple[str, ...]]:
    """The window of each layer, and what a user should know of how it was found."""
    window = file.get(f"{prefix}.attention.sliding_window", int, _BUILT_IN_WINDOWS.get(prefix, 0))
    if window <= 0:
        return [None] * num_layers, ()
    key = f"{prefix}.attention.sliding_window_pattern"
    pattern = file.metadata.get(key)
    if isinstance(pattern, array.array):
        flags = _per_layer(file, key, num_layers)
        return [window if flag else None for flag in flags], ()
    period = file.get(key, int, _WINDOW_PERIODS.get(prefix, -1))
    if period < 0:
        note = f"some layers attend to a window of {window} tokens, the header does not say which: all count in full"
        return [None] * num_layers, (note,)
    return periodic_windows(num_layers, window, period), ()


def open_gguf_outline(path: Path) -> Outline:
    """Of a file, whose header alone is read. Raises ModelError."""
    file = GgufFile(path)
    try:
        return read_gguf_outline(file)
    finally:
        file.close()
