"""What fits in memory: arithmetic by hand for known shapes, and the edge of every answer."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.kernels.select import select_backend
from octavo.model.header import ModelHeader
from octavo.model.kv_layout import KvLayer, KvLayout, group_layers, kv_layout
from octavo.model.memory import CachePlan, FreeMemory, cache_request, fit_cache
from octavo.model.plan import ModelPlan, PlanRequest, plan_model
from octavo.model.spec import ModelError, ModelSpec, RopeSpec

GIB = 2**30


def make_spec(**changes: object) -> ModelSpec:
    """Llama 3.1 8B, unless changed."""
    values: dict[str, object] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope": RopeSpec(rotary_dim=128),
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    }
    return ModelSpec(**(values | changes))  # type: ignore[arg-type]


def make_header(spec: ModelSpec, layout: KvLayout | None = None, num_parameters: int = 8_030_261_248) -> ModelHeader:
    return ModelHeader(
        name="a model",
        read="config.json",
        spec=spec,
        kv_layout=layout or kv_layout(spec),
        num_parameters=num_parameters,
        stored_bytes=None,
    )


def make_request(**changes: object) -> PlanRequest:
    values: dict[str, object] = {
        "device": torch.device("cuda"),
        "free": FreeMemory("cuda", 24 * GIB, 24 * GIB),
        "dtype": torch.bfloat16,
        "kernel_backend": "reference",
        "block_size": 32,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
        "max_model_len": None,
        "kv_cache_memory": None,
        "context": None,
        "concurrency": None,
    }
    return PlanRequest(**(values | changes))  # type: ignore[arg-type]


def fit(header: ModelHeader, plan: ModelPlan, *, max_num_seqs: int, max_model_len: int) -> CachePlan:
    """The server's arithmetic with these two settings, after the weights of the plan."""
    request = plan.request
    cache = cache_request(
        header.spec,
        select_backend("reference", request.device, request.dtype, 64),
        block_size=request.block_size,
        kv_cache_memory=request.kv_cache_memory,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        max_num_batched_tokens=request.max_num_batched_tokens,
    )
    return fit_cache(header.spec, header.kv_layout, cache, request.free.less(plan.chosen.weight_bytes))


def test_a_token_of_llama_3_1_8b_takes_128_kib_in_bfloat16() -> None:
    plan = plan_model(make_header(make_spec()), make_request())
    per_token = {dtype_plan.name: dtype_plan.kv_bytes_per_token for dtype_plan in plan.by_dtype}
    assert per_token == {"float32": 256 * 2**10, "bfloat16": 128 * 2**10, "float16": 128 * 2**10}
    assert plan.chosen.weight_bytes == 2 * 8_030_261_248
    assert plan.cache.kv_cache_bytes == (plan.chosen.num_blocks + 1) * 32 * 128 * 2**10


def test_a_token_of_smollm2_takes_22_and_a_half_kib_in_bfloat16() -> None:
    spec = make_spec(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64)
    assert kv_layout(spec).block_bytes(1, 2) == 2 * 30 * 3 * 64 * 2 == 22.5 * 2**10


def test_a_given_pool_is_divided_by_hand() -> None:
    """4 GiB of blocks of 4 MiB: 1024 blocks, one of them nobody's."""
    plan = plan_model(make_header(make_spec()), make_request(kv_cache_memory=4 * GIB, context=8192, concurrency=2))
    assert plan.chosen.pool_blocks == [1023]
    assert plan.cache.max_model_len == 1023 * 32
    assert plan.chosen.most_sequences.value == 1023 // 256 == 3
    assert plan.chosen.longest_context.value == 1023 // 2 * 32
    assert plan.fits
    assert not replace(plan, concurrency=4).fits


def test_gemma_3_270m_keeps_windows() -> None:
    """15 layers with a window of 512, 3 that see everything, one K/V head of 256 each."""
    windowed, full = KvLayer(1, 256, 256, 512), KvLayer(1, 256, 256)
    layout = group_layers([full if index % 6 == 5 else windowed for index in range(18)])
    assert [(len(group.layer_ids), group.layer.window) for group in layout.groups] == [(3, None), (15, 512)]
    assert layout.groups[0].layer_ids == (5, 11, 17)
    per_layer = 2 * 256 * 2  # K and V of a token in bytes of bfloat16
    assert layout.block_bytes(1, 2) == 18 * per_layer
    # Within the window everything is kept; beyond it 512 tokens are 16 blocks, and one more.
    assert layout.sequence_bytes(512, 32, 2) == 18 * 512 * per_layer
    assert layout.sequence_bytes(8192, 32, 2) == (15 * 17 * 32 + 3 * 8192) * per_layer
    assert layout.sequence_bytes(513, 16, 2) == 18 * 33 * 16 * per_layer
    assert layout.sequence_bytes(600, 16, 2) == (15 * 33 + 3 * 38) * 16 * per_layer


def test_windows_let_more_sequences_fit() -> None:
    spec = make_spec(num_hidden_layers=4)
    full = KvLayer(8, 128, 128)
    plain, windowed = group_layers([full] * 4), group_layers([full] + [replace(full, window=1024)] * 3)
    request = make_request(kv_cache_memory=4 * GIB, context=65536)
    few = plan_model(make_header(spec, plain, 10**6), request).chosen.most_sequences.value
    many = plan_model(make_header(spec, windowed, 10**6), request).chosen.most_sequences.value
    assert few == (4 * GIB // (16384 * 32) - 1) // 2048 == 3
    # In units of one layer's block: 2048 of the full layer, 33 of each windowed one, which also holds a step's 256;
    # block 0 of each is nobody's.
    assert many == (4 * GIB // (4096 * 32) - 1 - 3 * (256 + 1)) // (2048 + 3 * 33) == 14


@pytest.mark.parametrize("concurrency", [1, 3, 40])
def test_the_table_says_what_the_answers_say(concurrency: int) -> None:
    header = make_header(make_spec())
    plan = plan_model(header, make_request(concurrency=concurrency))
    for column in plan.columns:
        questions = {"context": column.context, "concurrency": concurrency}
        settings = {"max_model_len": column.context, "max_num_seqs": concurrency}
        asked = plan_model(header, make_request(**questions, **settings))
        assert asked.chosen.most_sequences.value == column.most_sequences
        assert asked.fits == (column.context <= plan.chosen.longest_context.value)


def test_whether_it_fits_is_said_of_the_planned_pool_which_may_be_smaller_than_the_answers() -> None:
    """The logits of 256 sequences take from the pool what four sequences need."""
    header, questions = make_header(make_spec()), {"context": 8192, "concurrency": 4}
    wide = plan_model(header, make_request(**questions, max_model_len=8192))
    assert wide.chosen.num_blocks * 32 < 4 * 8192
    assert (wide.chosen.most_sequences.value, wide.fits) == (4, False)
    narrow = plan_model(header, make_request(**questions, max_model_len=8192, max_num_seqs=4))
    assert (narrow.chosen.most_sequences.value, narrow.fits) == (4, True)


def test_more_sequences_than_a_step_takes_never_run_at_once() -> None:
    request = make_request(max_num_seqs=1000, max_num_batched_tokens=512, context=32, concurrency=1000)
    plan = plan_model(make_header(make_spec(num_hidden_layers=1), num_parameters=10**6), request)
    assert (plan.chosen.longest_context.value, plan.chosen.longest_context.by) == (0, "max-num-batched-tokens")
    assert (plan.chosen.most_sequences.value, plan.chosen.most_sequences.by) == (512, "max-num-batched-tokens")
    assert not plan.fits


def test_a_step_bounds_the_sequences_and_the_model_the_context() -> None:
    spec = make_spec(num_hidden_layers=1, max_position_embeddings=2048)
    request = make_request(max_num_batched_tokens=64, context=32)
    plan = plan_model(make_header(spec, num_parameters=10**6), request)
    assert (plan.chosen.most_sequences.value, plan.chosen.most_sequences.by) == (64, "max-num-batched-tokens")
    assert (plan.chosen.longest_context.value, plan.chosen.longest_context.by) == (2048, "model")
    assert plan.num_running == 64


def test_weights_larger_than_the_memory_say_what_is_missing_and_what_would_fit() -> None:
    header = make_header(make_spec())
    with pytest.raises(ModelError) as caught:
        plan_model(header, make_request(dtype=torch.float32))
    assert str(caught.value) == (
        "the weights take 29.92 GiB in float32, 5.92 GiB more than the 24.00 GiB of memory that are free; "
        "--dtype bfloat16 or --dtype float16 would fit"
    )
    with pytest.raises(ModelError, match=r"6\.96 GiB more than .* choose a model of less than 4\.3 billion parameters"):
        plan_model(header, make_request(free=FreeMemory("cuda", 8 * GIB, 8 * GIB)))
    with pytest.raises(ModelError, match=r"with --dtype float16, only .* is left for the KV cache"):
        plan_model(header, make_request(dtype=torch.float32, free=FreeMemory("cuda", 15 * GIB, 16 * GIB)))


def test_another_dtype_that_does_not_fit_is_told_beside_the_one_that_does() -> None:
    single = plan_model(make_header(make_spec()), make_request()).by_dtype[0]
    assert single.cache is None
    assert single.refusal is not None
    assert "29.92 GiB in float32" in single.refusal
    assert (single.num_blocks, single.most_sequences.value, single.longest_context.value) == (0, 0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 131073}, "max_model_len 131073 exceeds the 131072 positions that the model knows"),
        ({"kv_cache_memory": 30 * GIB}, "exceeds the 9.04 GiB of memory that are free; give less"),
        ({"kv_cache_memory": 2**20}, "holds too few blocks of 32 tokens"),
        ({"kernel_backend": "fast"}, "unknown kernel backend 'fast'"),
    ],
)
def test_what_the_server_refuses_the_plan_refuses(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        plan_model(make_header(make_spec()), make_request(**changes))


LAYERS = st.builds(
    KvLayer,
    num_kv_heads=st.sampled_from([1, 2, 8]),
    key_dim=st.sampled_from([64, 128]),
    value_dim=st.sampled_from([64, 128]),
    window=st.none() | st.integers(1, 5000),
)


@settings(deadline=None, max_examples=60)
@given(
    layers=st.lists(LAYERS, min_size=1, max_size=6),
    block_size=st.sampled_from([16, 32, 64]),
    trained_len=st.integers(1, 40000),
    free=st.integers(2**28, 2**36),
    pool=st.none() | st.integers(2**25, 2**27),
    concurrency=st.integers(1, 1000),
    on_cuda=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_answers_fit_and_one_more_does_not(
    layers: list[KvLayer],
    block_size: int,
    trained_len: int,
    free: int,
    pool: int | None,
    concurrency: int,
    on_cuda: bool,
    dtype: torch.dtype,
) -> None:
    """Fed back as settings, an answer holds so many sequences at once; one token or one sequence more does not."""
    spec = make_spec(num_hidden_layers=len(layers), max_position_embeddings=trained_len, vocab_size=1000)
    header = make_header(spec, group_layers(layers), num_parameters=10**6)
    kind = "cuda" if on_cuda else "cpu"
    request = make_request(
        device=torch.device(kind),
        free=FreeMemory(kind, free, 2 * free if on_cuda else free),
        block_size=block_size,
        max_num_batched_tokens=512,
        kv_cache_memory=pool,
        concurrency=concurrency,
        dtype=dtype,
    )
    try:
        plan = plan_model(header, request)
    except ModelError:
        return  # nothing is served in so little
    layout = header.kv_layout

    def holds(num_seqs: int, context: int) -> bool:
        if num_seqs > 512:
            return False
        try:
            cache = fit(header, plan, max_num_seqs=num_seqs, max_model_len=context)
        except ModelError:
            return False
        blocks = -(-context // block_size)
        for group, usable in zip(layout.groups, cache.usable_blocks, strict=True):
            needed = num_seqs * blocks
            if group.layer.window is not None:
                steady = min(blocks, -(-group.layer.window // block_size) + 1)
                needed = min(needed, num_seqs * steady + 512 // block_size)
            if needed > usable:
                return False
        return cache.max_model_len == context

    longest, most = plan.chosen.longest_context, plan.chosen.most_sequences
    assert longest.value == 0 or holds(concurrency, longest.value)
    assert longest.value == trained_len or not holds(concurrency, longest.value + 1)
    assert most.value == 0 or holds(most.value, plan.context)
    assert most.value == 512 or not holds(most.value + 1, plan.context)
    assert (longest.by == "max-num-batched-tokens") == (concurrency > 512)
    assert (longest.by == "model") == (longest.value == trained_len)
    answered = {"max_num_seqs": most.value, "max_model_len": plan.context, "context": plan.context}
    if most.value:
        assert plan_model(header, replace(request, concurrency=most.value, **answered)).fits
    if most.value < 512:
        more = answered | {"max_num_seqs": most.value + 1, "concurrency": most.value + 1}
        with suppress(ModelError):  # nor would it start
            assert not plan_model(header, replace(request, **more)).fits


@given(
    layers=st.lists(LAYERS, min_size=1, max_size=6),
    block_size=st.sampled_from([1, 16, 64]),
    num_bytes=st.integers(0, 2**28),
    limit=st.integers(0, 20000),
)
def test_the_longest_sequence_fits_and_one_block_more_does_not(
    layers: list[KvLayer], block_size: int, num_bytes: int, limit: int
) -> None:
    layout = group_layers(layers)
    longest = layout.longest_sequence(num_bytes, block_size, 2, limit)
    assert longest == 0 or layout.sequence_bytes(longest, block_size, 2) <= num_bytes
    assert longest == limit or layout.sequence_bytes(longest + block_size, block_size, 2) > num_bytes


def test_without_windows_the_longest_sequence_is_a_division() -> None:
    layout = kv_layout(make_spec())
    for num_bytes in (0, 1, 4 * 2**20 - 1, 4 * 2**20, GIB + 5):
        blocks = num_bytes // layout.block_bytes(32, 2)
        assert layout.longest_sequence(num_bytes, 32, 2, 10**9) == blocks * 32


def test_layers_are_grouped_by_kind_whatever_their_order() -> None:
    one, other = KvLayer(1, 64, 64), KvLayer(2, 64, 64)
    layout = group_layers([one, other, one])
    assert [group.layer_ids for group in layout.groups] == [(0, 2), (1,)]
    assert layout.num_layers == 3
    assert not layout.is_windowed
