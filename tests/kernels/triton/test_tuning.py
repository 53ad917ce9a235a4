"""The tuning table: what a lookup finds, what a load refuses, and that what ships fits the cards it ships for."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.kernels.backend import AttentionSpec
from octavo.kernels.triton import tuning
from octavo.kernels.triton.decode import DecodeConfig
from octavo.kernels.triton.prefill import PrefillConfig

DECODE = {"tile": 64, "num_warps": 4, "num_stages": 3}
PREFILL = {"rows": 128, "tile": 64, "num_warps": 8, "num_stages": 3}


def spec(head_dim: int = 128, group: int = 4) -> AttentionSpec:
    return AttentionSpec(2 * group, 2, head_dim, head_dim**-0.5)


def entry(settings: dict[str, int], source: str = "compile", **key: list[Any]) -> dict[str, Any]:
    names = {"head_dim": [128], "block": [32], "group": [4], "dtype": ["bfloat16"], "capability": [90]}
    return {**names, **key, **settings, "source": source}


def document(**changes: Any) -> dict[str, Any]:
    return {"default_chunk": 512, "chunks": [], "decode": [], "prefill": [], **changes}


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Replaces the shipped table for a test."""

    def put(**changes: Any) -> None:
        table = tuning.parse(document(**changes))
        tuning.decode_config.cache_clear()
        tuning.prefill_config.cache_clear()
        monkeypatch.setattr(tuning, "shipped", lambda: table)

    yield put
    tuning.decode_config.cache_clear()
    tuning.prefill_config.cache_clear()


def decode(head_dim: int = 128, group: int = 4, block: int = 32, capability: tuple[int, int] = (9, 0)) -> DecodeConfig:
    return tuning.decode_config(spec(head_dim, group), block, torch.bfloat16, capability)


def test_an_exact_entry_is_taken_and_a_measured_one_first(use: Any) -> None:
    use(decode=[entry({**DECODE, "num_stages": 7}, "measured"), entry(DECODE)])
    assert decode() == DecodeConfig(chunk=512, tile=64, num_warps=4, num_stages=7)
    use(decode=[entry(DECODE), entry({**DECODE, "num_stages": 7}, "measured")])
    assert decode().num_stages == 7


def test_else_the_nearest_group_then_the_nearest_block_of_the_same_card(use: Any) -> None:
    near, nearer = {**DECODE, "num_stages": 4}, {**DECODE, "num_stages": 5}
    other_card = entry({**DECODE, "num_stages": 6}, group=[3], capability=[80])
    use(decode=[entry(DECODE, group=[8]), entry(near, block=[64]), entry(nearer, block=[32]), other_card])
    assert decode(group=3, block=16).num_stages == 5
    assert decode(group=7, block=16).num_stages == 3


def test_a_neighbour_runs_the_same_path_and_element_size(use: Any) -> None:
    use(decode=[entry({**DECODE, "num_warps": 1}, group=[1]), entry({**DECODE, "num_warps": 2}, dtype=["float32"])])
    assert decode(group=2).num_warps == tuning.default_decode(tuning.Key(128, 32, 2, "bfloat16", 90))["num_warps"]
    half = tuning.decode_config(spec(group=1), 32, torch.float16, (9, 0))
    assert half.num_warps == 1


def test_a_neighbours_prefill_entry_gets_rows_for_the_group(use: Any) -> None:
    use(prefill=[entry({**PREFILL, "rows": 16})])
    assert tuning.prefill_config(spec(group=24), 32, torch.bfloat16, (9, 0)) == PrefillConfig(32, 64, 8, 3)


def test_the_chunk_depends_on_head_size_and_group_alone(use: Any) -> None:
    use(chunks=[{"head_dim": 128, "group": 4, "chunk": 32}])
    assert {decode(capability=c, block=b).chunk for c, b in product([(8, 0), (9, 0), (12, 0)], [16, 64])} == {32}
    assert decode().tile == 32
    assert decode(group=2).chunk == 512


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"decode": [entry({**DECODE, "tile": 48})]}, "not a power of two"),
        ({"decode": [entry({**DECODE, "tile": 8})]}, "tiles below 16"),
        ({"decode": [entry({**DECODE, "num_warps": 32})]}, "more than 16 warps"),
        ({"decode": [entry({**DECODE, "num_stages": 0})]}, "num_stages is 0"),
        ({"decode": [entry({**DECODE, "tile": True})]}, "not a power of two"),
        ({"decode": [entry(DECODE), entry(DECODE, block=[16, 32])]}, "again"),
        ({"decode": [entry(DECODE, "guess")]}, "source is 'guess'"),
        ({"decode": [entry(DECODE, dtype=["bf16"])]}, "dtype is 'bf16'"),
        ({"decode": [entry(PREFILL)]}, "its fields are"),
        ({"decode": [entry(DECODE)], "default_chunk": 32}, "no multiple"),
        ({"decode": [entry(DECODE)], "chunks": [{"head_dim": 128, "group": 4, "chunk": 96}]}, "a chunk of 96"),
        ({"prefill": [entry({**PREFILL, "rows": 16}, group=[1, 20])]}, "fewer rows than heads"),
    ],
)
def test_a_table_that_breaks_a_rule_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        tuning.parse(document(**changes))


def test_another_dtype_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="not float64"):
        tuning.decode_config(spec(), 32, torch.float64, (9, 0))


def test_what_ships_is_valid_and_fits_its_cards() -> None:
    table = tuning.shipped()
    for entries, shared in ((table.decode, tuning.decode_shared), (table.prefill, tuning.prefill_shared)):
        assert {key.capability for key in entries} >= {80, 90, 100}
        for key, found in entries.items():
            assert shared(found.settings, key) <= tuning.shared_limit(key.capability), key
    for head_dim, group, block in product((64, 80, 96, 128, 256), (1, 2, 3, 4, 8), (16, 32, 64)):
        for dtype, capability in product(("bfloat16", "float16", "float32"), (80, 90, 100)):
            key = tuning.Key(head_dim, block, group, dtype, capability)
            assert key in table.decode
            assert key in table.prefill


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    path = Path(__file__).parents[3] / "bench" / "sweep.py"
    found = importlib.util.spec_from_file_location("octavo_bench_sweep", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    return module


def test_the_file_is_as_the_sweep_writes_it(sweep: ModuleType) -> None:
    text = tuning._PATH.read_text(encoding="utf-8")
    assert text == sweep.as_text(json.loads(text))


def test_a_sweeps_result_takes_the_place_of_its_last_one(sweep: ModuleType, use: Any) -> None:
    key = tuning.Key(128, 32, 4, "bfloat16", 90)
    found = document(decode=[entry(DECODE, group=[4, 8])], prefill=[entry(PREFILL)])
    for stages in (5, 7):
        found = sweep.merged(found, "decode", key, {**DECODE, "num_stages": stages, "chunk": 256})
    found = sweep.merged(found, "prefill", key, {**PREFILL, "num_stages": 5})
    assert [item["source"] for item in found["decode"]] == ["compile", "measured"]
    use(**found)
    assert decode() == DecodeConfig(256, 64, 4, 7)
    assert decode(group=8) == DecodeConfig(512, 64, 4, 3)
    assert tuning.prefill_config(spec(), 32, torch.bfloat16, (9, 0)).num_stages == 5
    back = sweep.merged(found, "decode", key, {**DECODE, "chunk": 512})
    assert back["chunks"] == []


def test_a_sweep_keeps_what_was_fastest_over_all_of_the_work(sweep: ModuleType) -> None:
    measured = [{"settings": {"tile": t}, "seconds": s} for t, s in ((16, [1.0, 9.0]), (32, [2.0, 2.0]))]
    assert sweep.best(measured) == {"tile": 32}
    with pytest.raises(SystemExit):
        sweep.best([])


@settings(deadline=None)
@given(
    head_dim=st.sampled_from([16, 32, 64, 72, 80, 96, 112, 128, 192, 256, 512]),
    group=st.integers(1, 71),
    block=st.sampled_from([16, 32, 64, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    capability=st.sampled_from([(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]),
)
def test_any_shape_on_any_card_gets_settings_that_the_kernels_take(
    head_dim: int, group: int, block: int, dtype: torch.dtype, capability: tuple[int, int]
) -> None:
    decode = tuning.decode_config(spec(head_dim, group), block, dtype, capability)
    prefill = tuning.prefill_config(spec(head_dim, group), block, dtype, capability)
    assert decode.chunk % decode.tile == 0
    assert min(decode.tile, prefill.tile, prefill.rows) >= 16
    assert prefill.rows >= group
    for number in (decode.tile, decode.chunk, prefill.rows, prefill.tile, decode.num_warps, prefill.num_warps):
        assert number & (number - 1) == 0
    key = tuning.Key.of(spec(head_dim, group), block, dtype, capability)
    if head_dim <= 256 and group <= 32:
        limit = tuning.shared_limit(key.capability)
        assert tuning.decode_shared(tuning.default_decode(key), key) <= limit
        assert tuning.prefill_shared(tuning.default_prefill(key), key) <= limit
