"""How memory is divided among layers that keep everything and layers with a window."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.model.kv_layout import KvLayer, KvLayout, group_layers
from octavo.model.memory import CachePlan, CacheRequest, FreeMemory, fit_cache
from octavo.model.pool_split import PoolSplit
from octavo.model.spec import ModelError, ModelSpec, RopeSpec

GIB = 2**30
FULL, WINDOWED = KvLayer(1, 256, 256), KvLayer(1, 256, 256, 512)
GEMMA_3_270M = group_layers([FULL if index % 6 == 5 else WINDOWED for index in range(18)])
BLOCK_BYTES = [3 * 32 * 2 * 256 * 2, 15 * 32 * 2 * 256 * 2]  # of Gemma 3 270M's groups, 32 tokens in bfloat16


def split_of(layout: KvLayout = GEMMA_3_270M, **changes: int) -> PoolSplit:
    sizes = {"block_size": 32, "itemsize": 2, "max_num_seqs": 16, "max_model_len": 8192, "step_tokens": 512} | changes
    return PoolSplit(layout=layout, **sizes)  # type: ignore[arg-type]


def test_little_memory_makes_pools_of_equal_length() -> None:
    """As if there were no windows: a windowed pool never takes more than its layers' share."""
    assert split_of().largest(20 * sum(BLOCK_BYTES)) == [19, 19]


@pytest.mark.parametrize(
    ("num_tokens", "windowed_mib", "all_full_mib"),
    [(512, 9, 9), (1024, 11, 18), (2048, 14, 36), (4096, 20, 72), (8192, 32, 144), (16384, 56, 288), (32768, 104, 576)],
)
def test_what_a_conversation_with_gemma_3_270m_keeps(num_tokens: int, windowed_mib: int, all_full_mib: int) -> None:
    """The table of docs/plan.md."""
    assert round(GEMMA_3_270M.sequence_bytes(num_tokens, 32, 2) / 2**20) == windowed_mib
    assert group_layers([FULL] * 18).sequence_bytes(num_tokens, 32, 2) == all_full_mib * 2**20


def test_there_is_a_window_for_every_four_windows_of_tokens() -> None:
    """Four are 64 blocks, a window takes 17, and a step's part of a prompt 16."""
    split = split_of(max_num_seqs=256)
    for level in (64, 640, 6400):
        assert split.blocks(level) == [level, 16 + 17 * level // 64]
    assert split_of(max_num_seqs=256, max_model_len=1024).blocks(640) == [640, 16 + 17 * 640 // 32]


def test_a_windowed_pool_ends_where_the_windows_of_all_sequences_do() -> None:
    """16 windows of 17 blocks, and the 16 blocks of a step's part of a prompt. The rest is for layers without."""
    split = split_of()
    assert split.largest(GIB // 4) == [(GIB // 4 - 289 * BLOCK_BYTES[1]) // BLOCK_BYTES[0] - 1, 16 * 17 + 16]
    assert split.mark == 16 * 256
    assert split.blocks(split.mark) == [16 * 256, 288]
    # Beyond what sequences can use, the windows of cached prefixes come first.
    assert split.blocks(2 * split.mark) == [16 * 256, 2 * 288]
    assert split.blocks(3 * split.mark) == [2 * 16 * 256, 3 * 288]


def test_a_window_as_long_as_the_context_is_none() -> None:
    split = split_of(max_model_len=512)
    for level in (1, 100, 256, 400, 512, 900):
        full, windowed = split.blocks(level)
        assert full == windowed


def test_a_length_that_is_asked_for_gets_room_before_numbers_do() -> None:
    """Gemma 3 27B beside its weights on a GPU of 80 GB: 52 layers with a window of 1024, 10 without."""
    layout = group_layers([KvLayer(16, 128, 128, None if index % 6 == 5 else 1024) for index in range(62)])
    split = split_of(layout, max_num_seqs=256, max_model_len=131072, step_tokens=8192)
    budget = 19 * GIB
    many = split.largest(budget)
    assert split.longest_sequence(many) == many[0] * 32 < 100_000
    asked = replace(split, must_fit=131072)
    assert asked.longest_that_fits(budget) == 131072
    assert asked.largest(budget)[0] >= 131072 // 32
    assert asked.largest(budget)[1] >= 33 + 256
    assert asked.num_bytes(asked.largest(budget)) <= budget


LAYERS = st.builds(
    KvLayer,
    num_kv_heads=st.sampled_from([1, 2]),
    key_dim=st.just(64),
    value_dim=st.just(64),
    window=st.none() | st.integers(1, 3000),
)


@given(
    layers=st.lists(LAYERS, min_size=1, max_size=5),
    num_bytes=st.integers(0, 2**26),
    max_num_seqs=st.integers(1, 300),
    max_model_len=st.integers(1, 5000),
    step_tokens=st.sampled_from([1, 64, 512, 8192]),
    must_fit=st.integers(0, 5000),
)
@settings(deadline=None, max_examples=200)
def test_pools_take_what_there_is_and_no_more(
    layers: list[KvLayer], num_bytes: int, max_num_seqs: int, max_model_len: int, step_tokens: int, must_fit: int
) -> None:
    split = split_of(
        group_layers(layers), max_num_seqs=max_num_seqs, max_model_len=max_model_len, step_tokens=step_tokens
    )
    split = replace(split, must_fit=min(must_fit, split.longest_that_fits(num_bytes)))
    blocks = split.largest(num_bytes)
    if not blocks:
        assert split.num_bytes([0] * len(split.layout.groups)) > num_bytes
        return
    assert split.num_bytes(blocks) <= num_bytes
    assert split.longest_sequence(blocks) >= min(split.must_fit, max_model_len)
    # Whoever would take a block more has no room for it: that of no group alone is free, or it has what it can use.
    larger = split.largest(num_bytes + sum(group.block_bytes(32, 2) for group in split.layout.groups))
    assert all(more >= count for more, count in zip(larger, blocks, strict=True))


SPEC = ModelSpec(
    architecture="LlamaForCausalLM",
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope=RopeSpec(rotary_dim=16),
    max_position_embeddings=3000,
    tie_word_embeddings=True,
)


def fit(layout: KvLayout, free: int, memory: int | None, max_model_len: int | None, max_num_seqs: int) -> CachePlan:
    request = CacheRequest(
        block_size=32,
        dtype=torch.bfloat16,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=512,
        kv_cache_memory=memory,
        max_model_len=max_model_len,
    )
    return fit_cache(SPEC, layout, request, FreeMemory("cpu", free, free))


@given(
    layers=st.lists(LAYERS, min_size=1, max_size=5),
    free=st.integers(2**23, 2**28),
    memory=st.none() | st.integers(2**18, 2**22),
    max_model_len=st.none() | st.integers(1, 3000),
    max_num_seqs=st.integers(1, 300),
)
@settings(deadline=None, max_examples=200)
def test_a_plan_s_numbers_given_as_settings_make_the_same_pools(
    layers: list[KvLayer], free: int, memory: int | None, max_model_len: int | None, max_num_seqs: int
) -> None:
    """What `octavo plan` prints as a command."""
    layout = group_layers(layers)
    try:
        plan = fit(layout, free, memory, max_model_len, max_num_seqs)
    except ModelError:
        return
    again = fit(layout, free, plan.kv_cache_bytes, plan.max_model_len, max_num_seqs)
    assert (again.pools, again.max_model_len) == (plan.pools, plan.max_model_len)
    assert again.notes == ()


def test_a_context_cut_short_says_that_it_can_be_asked_for() -> None:
    layout = group_layers([KvLayer(8, 128, 128)] + [KvLayer(8, 128, 128, 64)] * 7)
    memory = 8 * 40 * layout.groups[0].block_bytes(32, 2)
    plan = fit(layout, 2**40, memory, None, 256)
    assert plan.max_model_len == (plan.pools[0].num_blocks - 1) * 32 < 3000
    assert plan.notes[0].endswith(
        "lifts the limit, and a max-model-len of up to 3000 does, at the cost of how many run at once"
    )
    assert fit(layout, 2**40, memory, 3000, 256).max_model_len == 3000


@pytest.mark.parametrize("window", [1, 16, 17, 32, 33, 100])
def test_sequences_hold_their_windows_and_share_a_step(window: int) -> None:
    layer = KvLayer(1, 64, 64, window)
    steady = -(-window // 16) + 1
    assert layer.blocks_of_sequence(10_000, 16) == steady
    assert layer.blocks_of_sequences(5, 10_000, 16, 64) == 5 * steady + 4
    assert layer.blocks_of_sequences(5, 16, 16, 64) == 5
    assert replace(layer, window=None).blocks_of_sequences(5, 33, 16, 64) == 15


def test_a_long_context_is_not_refused_for_the_sake_of_large_steps() -> None:
    """A prompt runs in smaller parts where a windowed pool is small (tests/scheduler/test_window_scheduling.py)."""
    layout = group_layers([KvLayer(4, 64, 64)] * 3 + [KvLayer(4, 64, 64, 512)] * 15)
    spec = replace(SPEC, max_position_embeddings=32768)
    for step_tokens in (512, 8192):
        request = CacheRequest(
            block_size=32, dtype=torch.bfloat16, max_num_seqs=256, max_num_batched_tokens=step_tokens,
            kv_cache_memory=160 * 2**20, max_model_len=32768,
        )  # fmt: skip
        plan = fit_cache(spec, layout, request, FreeMemory("cpu", 2**40, 2**40))
        assert plan.max_model_len == 32768
        assert plan.notes == ()


@pytest.mark.parametrize(
    ("memory", "windows", "longest"), [(2_300_000, (None, 64), 1984), (400_000, (64,), 2048)], ids=["both", "window"]
)
def test_a_pool_of_small_windows_needs_no_more_than_they_hold(
    memory: int, windows: tuple[int | None, ...], longest: int
) -> None:
    layout = group_layers([KvLayer(4, 64, 64, window) for window in windows])
    request = CacheRequest(
        block_size=64, dtype=torch.bfloat16, max_num_seqs=1, max_num_batched_tokens=64, kv_cache_memory=memory,
        max_model_len=2048,
    )  # fmt: skip
    plan = fit_cache(SPEC, layout, request, FreeMemory("cpu", 2**40, 2**40))
    assert plan.max_model_len == longest


def test_what_is_said_to_be_enough_is_enough() -> None:
    layout = group_layers([KvLayer(8, 128, 128)] + [KvLayer(8, 128, 128, 64)] * 7)
    with pytest.raises(ModelError, match=r"give at least (\d+\.\d) MiB") as caught:
        fit(layout, 2**40, 2**20, None, 256)
    least = re.search(r"at least (\d+\.\d) MiB", str(caught.value))
    assert least is not None
    assert fit(layout, 2**40, int(float(least[1]) * 2**20), None, 256).max_model_len >= 32
