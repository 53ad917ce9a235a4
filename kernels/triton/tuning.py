"""Launch settings of the attention kernels, looked up and never searched for while serving.

`tuning.json` is written offline: its first entries by reading compiles (bench/aot.py: nothing spilled, everything fits
shared memory), later ones by timing on a card (bench/sweep.py). "source" says which. An entry names lists of values and
stands for every combination of them. A lookup takes the first of

1. an entry of exactly this (head_dim, block, group, dtype, capability), a measured one before a compiled one;
2. an entry of the same head_dim, capability, element size and path (one query head per K/V head, or several), with the
   nearest group, then the nearest block, then a measured one;
3. a default that fits the card's shared memory, for shapes and cards that nobody has looked at.

The chunk length stands apart, by (head_dim, group) alone: it is where a sum is cut, and the same model should cut it at
the same places on every card.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

import triton

from ..backend import AttentionSpec
from .decode import DecodeConfig
from .prefill import PrefillConfig

_PATH = Path(__file__).with_name("tuning.json")
_KIB = 1024
_SHARED_KIB = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}
_SMALLEST_SHARED_KIB = 99
_READS_SHARED = (90, 100, 103, 110)
"""Cards whose matrix units take operands from shared memory (wgmma, tcgen05) instead of registers."""
_SOURCES = ("measured", "compile")
_KEY_FIELDS = ("head_dim", "block", "group", "dtype", "capability")
_DECODE_FIELDS = ("tile", "num_warps", "num_stages")
_PREFILL_FIELDS = ("rows", "tile", "num_warps", "num_stages")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_REST_BYTES = 8 * _KIB
"""Of shared memory: block ids in flight, sums across warps, weights between two products."""
_MIN_DOT = 16
"""What a matrix unit multiplies at least, in rows and in keys."""


@dataclass(frozen=True, slots=True)
class Key:
    """What a setting may depend on."""

    head_dim: int
    block: int
    """Tokens per block of the pool."""
    group: int
    """Query heads per K/V head."""
    dtype: str
    """Of queries, keys and values: bfloat16 | float16 | float32."""
    capability: int
    """Ten times the major version plus the minor one: 90 for sm_90."""

    @classmethod
    def of(cls, spec: AttentionSpec, block_size: int, dtype: torch.dtype, capability: tuple[int, int]) -> Key:
        name, (major, minor) = str(dtype).removeprefix("torch."), capability
        if name not in _DTYPES:
            raise ValueError(f"the attention kernels take {', '.join(_DTYPES)}, not {name}")
        return cls(spec.head_dim, block_size, spec.num_heads // spec.num_kv_heads, name, 10 * major + minor)

    @property
    def item_bytes(self) -> int:
        return _DTYPES[self.dtype].itemsize

    @property
    def dim_pad(self) -> int:
        return int(triton.next_power_of_2(self.head_dim))


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry's settings, by name, for one key."""

    settings: Mapping[str, int]
    source: str


@dataclass(frozen=True, slots=True)
class Table:
    """tuning.json, checked. Where a measured and a compiled entry name the same key, the measured one is kept."""

    default_chunk: int
    chunks: Mapping[tuple[int, int], int]
    """By (head_dim, group), where it is not the default."""
    decode: Mapping[Key, Entry]
    prefill: Mapping[Key, Entry]

    def chunk(self, key: Key) -> int:
        """Tokens per split."""
        return self.chunks.get((key.head_dim, key.group), self.default_chunk)


@cache
def decode_config(
    spec: AttentionSpec, block_size: int, dtype: torch.dtype, capability: tuple[int, int]
) -> DecodeConfig:
    """Settings of `paged_decode`, `capability` as torch.cuda gives it. A dtype that Key does not know: ValueError."""
    table, key = shipped(), Key.of(spec, block_size, dtype, capability)
    settings = _lookup(table.decode, key) or default_decode(key)
    # A table never holds a tile longer than a chunk, but a neighbour's entry may stand by another chunk.
    chunk = table.chunk(key)
    return DecodeConfig(chunk=chunk, **{**settings, "tile": min(settings["tile"], chunk)})


@cache
def prefill_config(
    spec: AttentionSpec, block_size: int, dtype: torch.dtype, capability: tuple[int, int]
) -> PrefillConfig:
    """Settings of `paged_prefill`; otherwise like `decode_config`."""
    key = Key.of(spec, block_size, dtype, capability)
    settings = _lookup(shipped().prefill, key) or default_prefill(key)
    # A program holds at least one query with all of its heads, also by a neighbour's entry.
    return PrefillConfig(**{**settings, "rows": max(settings["rows"], int(triton.next_power_of_2(key.group)))})


@cache
def shipped() -> Table:
    """The packaged table. One that breaks a rule: ValueError."""
    return parse(json.loads(_PATH.read_text(encoding="utf-8")))


def shared_limit(capability: int) -> int:
    """Bytes of shared memory that one program may have; of unknown cards what every one since 8.0 gives."""
    return _SHARED_KIB.get(capability, _SMALLEST_SHARED_KIB) * _KIB


def default_decode(key: Key) -> dict[str, int]:
    """About 32 KiB of keys and values per step, less where shared memory is short."""
    tile = max(_MIN_DOT, min(128, 16 * _KIB // (key.dim_pad * key.item_bytes)))
    settings = {"tile": tile, "num_warps": 4 if key.item_bytes <= 2 else 8, "num_stages": 3}
    return _fitted(settings, key, decode_shared)


def default_prefill(key: Key) -> dict[str, int]:
    """As much of a tile as the accumulators of a program leave registers for; exact fp32 products take the most."""
    if key.item_bytes > 2:
        rows, tile = (32, 16) if key.dim_pad <= 128 else (16, 16)
    elif key.dim_pad > 128:
        rows, tile = 64, 32
    else:
        rows, tile = 128, 64 if key.capability in _READS_SHARED else 32
    rows = max(rows, int(triton.next_power_of_2(key.group)))
    return _fitted({"rows": rows, "tile": tile, "num_warps": 8, "num_stages": 3}, key, prefill_shared)


def decode_shared(settings: Mapping[str, int], key: Key) -> int:
    """Bytes of shared memory that decode takes at most: tiles of keys and values in flight, queries, and a rest."""
    if key.group == 1:
        # Products element by element read from registers, so that a tile may be on its way from shared memory too.
        return _tiles_in_flight(settings, key, 1) + _REST_BYTES
    queries = max(_MIN_DOT, int(triton.next_power_of_2(key.group))) * key.dim_pad * key.item_bytes
    return queries + _tiles_in_flight(settings, key, 0) + _REST_BYTES


def prefill_shared(settings: Mapping[str, int], key: Key) -> int:
    """The same for prefill. A matrix unit that reads shared memory also wants the queries there, and one more tile of
    keys and values: it still reads the last one while the next arrives."""
    queries = settings["rows"] * key.dim_pad * key.item_bytes
    return queries + _tiles_in_flight(settings, key, int(key.capability in _READS_SHARED)) + _REST_BYTES


def _tiles_in_flight(settings: Mapping[str, int], key: Key, more: int) -> int:
    # A load through a block table is two loads in a row, and each of them takes its share of the stages.
    buffers = max(1, (settings["num_stages"] - 1) // 2) + more
    return 2 * buffers * settings["tile"] * key.dim_pad * key.item_bytes


def _fitted(settings: dict[str, int], key: Key, shared: Callable[[Mapping[str, int], Key], int]) -> dict[str, int]:
    """The settings with a tile, then rows, halved until they fit the card, as far as a matrix unit allows."""
    limit = shared_limit(key.capability)
    smallest = {"tile": _MIN_DOT, "rows": max(_MIN_DOT, int(triton.next_power_of_2(key.group)))}
    for name in ("tile", "rows"):
        while name in settings and settings[name] > smallest[name] and shared(settings, key) > limit:
            settings = {**settings, name: settings[name] // 2}
    return settings


def _lookup(entries: Mapping[Key, Entry], key: Key) -> dict[str, int] | None:
    """Settings of the key, or of the nearest one that runs the same code on the same card; None where there is none."""
    if key in entries:
        return dict(entries[key].settings)

    def runs_the_same(other: Key) -> bool:
        same_card = (other.head_dim, other.capability) == (key.head_dim, key.capability)
        return same_card and other.item_bytes == key.item_bytes and (other.group == 1) == (key.group == 1)

    def distance(other: Key) -> tuple[int, int, int, bool]:
        source = _SOURCES.index(entries[other].source)
        return abs(other.group - key.group), abs(other.block - key.block), source, other.dtype != key.dtype

    near = [other for other in entries if runs_the_same(other)]
    return dict(entries[min(near, key=distance)].settings) if near else None


def parse(document: Mapping[str, Any]) -> Table:
    """A table from tuning.json's content. What a kernel would not take, or a key named twice: ValueError."""
    chunks = {(item["head_dim"], item["group"]): item["chunk"] for item in document["chunks"]}
    for chunk in (document["default_chunk"], *chunks.values()):
        _require(_is_power_of_2(chunk) and chunk >= _MIN_DOT, f"a chunk of {chunk} tokens")
    decode = _entries(document["decode"], "decode", _DECODE_FIELDS)
    prefill = _entries(document["prefill"], "prefill", _PREFILL_FIELDS)
    table = Table(document["default_chunk"], chunks, decode, prefill)
    for key, entry in decode.items():
        chunk = table.chunk(key)
        _require(chunk % entry.settings["tile"] == 0, f"{key}: a chunk of {chunk} is no multiple of its tile")
    for key, entry in prefill.items():
        _require(entry.settings["rows"] >= key.group, f"{key}: fewer rows than heads of the group")
    return table


def _entries(items: Sequence[Mapping[str, Any]], kernel: str, fields: tuple[str, ...]) -> dict[Key, Entry]:
    found: dict[str, dict[Key, Entry]] = {source: {} for source in _SOURCES}
    for number, item in enumerate(items):
        name = f"{kernel} entry {number}"
        _require(set(item) == {*_KEY_FIELDS, *fields, "source"}, f"{name}: its fields are {sorted(item)}")
        _require(item["source"] in _SOURCES, f"{name}: source is {item['source']!r}")
        settings = {field: item[field] for field in fields}
        _check(settings, name)
        for key in _keys(item):
            _require(key.dtype in _DTYPES, f"{name}: dtype is {key.dtype!r}")
            _require(key not in found[item["source"]], f"{name}: names {key} again")
            found[item["source"]][key] = Entry(settings, item["source"])
    return {**found["compile"], **found["measured"]}


def _keys(item: Mapping[str, Any]) -> Iterator[Key]:
    for values in product(*(item[field] for field in _KEY_FIELDS)):
        yield Key(*values)


def _check(settings: Mapping[str, int], name: str) -> None:
    for field, value in settings.items():
        if field == "num_stages":
            _require(type(value) is int and 1 <= value <= 8, f"{name}: num_stages is {value!r}")
        else:
            _require(_is_power_of_2(value), f"{name}: {field} is {value!r}, not a power of two")
    _require(settings["num_warps"] <= 16, f"{name}: more than 16 warps")
    _require(min(settings["tile"], settings.get("rows", _MIN_DOT)) >= _MIN_DOT, f"{name}: tiles below {_MIN_DOT}")


def _is_power_of_2(value: object) -> bool:
    return type(value) is int and value > 0 and value & (value - 1) == 0


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(f"{_PATH.name}: {problem}")
