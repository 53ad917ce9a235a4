"""The backend in Python: steps recorded and run at once equal the same operators run one by one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from octavo.kernels.backend import AttentionInputs, AttentionSpec, DecodeRows, DrawParameters
from octavo.kernels.cpu.backend import CpuBackend
from octavo.kernels.reference.backend import ReferenceBackend
from octavo.kernels.select import fallback_note, label, select_backend

CPU = torch.device("cpu")
SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25)
HIDDEN, VOCAB, BLOCK = 64, 96, 16


class Weight:
    encoding = "F32"

    def __init__(self, *shape: int) -> None:
        self.name = "weight"
        self._values = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) / 8
        self.shape = shape

    def raw(self) -> torch.Tensor:
        return self._values.view(torch.uint8)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return self._values.to(dtype, copy=True)


class TinyStep:
    """One layer of a transformer out of operators alone."""

    def __init__(self, backend: CpuBackend) -> None:
        self.backend = backend
        self.table = backend.pack_embedding(Weight(VOCAB, HIDDEN))
        self.norm = backend.pack_vector(Weight(HIDDEN))
        self.qkv = backend.pack_linear([Weight(64, HIDDEN), Weight(32, HIDDEN), Weight(32, HIDDEN)])
        self.out = backend.pack_linear([Weight(HIDDEN, 64)], [Weight(HIDDEN)])
        self.gate_up = backend.pack_linear([Weight(80, HIDDEN), Weight(80, HIDDEN)])
        self.down = backend.pack_linear([Weight(HIDDEN, 80)])
        self.rope = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
        self.kv = torch.zeros(8, 2, 2, BLOCK, 16, dtype=backend.dtype)

    def __call__(self, token_ids: torch.Tensor, plans: tuple[Any, ...], logits_indices: torch.Tensor) -> torch.Tensor:
        b, (plan,) = self.backend, plans
        residual = b.embed(token_ids, self.table)
        x = b.rms_norm(residual, self.norm, 1e-5)
        q = b.rope_and_write_kv(b.linear(x, self.qkv), self.rope, self.kv, plan, SPEC)
        x = b.linear(b.attention(q, self.kv, plan, SPEC), self.out)
        x, residual = b.add_rms_norm(x, residual, self.norm, 1e-5)
        x = b.linear(b.gated(b.linear(x, self.gate_up), "silu"), self.down)
        hidden = b.add(x, residual)
        return b.logits(b.rms_norm(b.select_rows(hidden, logits_indices), self.norm, 1e-5), self.table)


def inputs_of(num_tokens: int) -> AttentionInputs:
    """One sequence from its start, in blocks 1, 2, …"""
    num_decode = int(num_tokens == 1)
    return AttentionInputs(
        num_rows=1,
        num_decode_rows=num_decode,
        max_query_len=0 if num_decode else num_tokens,
        query_lens=[num_tokens],
        context_lens=[num_tokens],
        query_starts=torch.tensor([0, num_tokens]),
        kv_lens=torch.tensor([num_tokens]),
        positions=torch.arange(num_tokens),
        slots=torch.arange(BLOCK, BLOCK + num_tokens),
        block_tables=torch.tensor([[1, 2, 3]]),
    )


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def backend(request: pytest.FixtureRequest) -> CpuBackend:
    return CpuBackend(CPU, request.param, 2)


@torch.inference_mode()
def test_a_recorded_step_equals_its_operators_one_by_one(backend: CpuBackend) -> None:
    compute = TinyStep(backend)
    recorded = backend.record(compute, max_num_tokens=40, max_num_logits=5, num_groups=1)
    assert recorded is not None
    for num_tokens, wanted in ((1, [0]), (3, [0, 2]), (40, [39, 7, 7, 0, 12]), (17, []), (2, [1])):
        token_ids = torch.arange(num_tokens) % VOCAB
        indices = torch.tensor(wanted, dtype=torch.int64)
        plans = (backend.plan_attention(inputs_of(num_tokens), SPEC, BLOCK),)
        logits = recorded(token_ids, plans, indices).clone()
        keys = compute.kv.clone()
        compute.kv.zero_()
        assert torch.equal(logits, compute(token_ids, plans, indices))
        assert logits.shape == (len(wanted), VOCAB)
        assert not logits.isnan().any()
        written = slice(1, 1 + -(-num_tokens // BLOCK))
        assert torch.equal(keys[written][..., :num_tokens, :].isnan(), compute.kv[written][..., :num_tokens, :].isnan())


@torch.inference_mode()
def test_buffers_of_a_recording_are_shared(backend: CpuBackend) -> None:
    compute = TinyStep(backend)

    def deep(token_ids: torch.Tensor, plans: Any, indices: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            logits = compute(token_ids, plans, indices)
        return logits

    shallow, deeper = (backend.record(f, max_num_tokens=512, max_num_logits=4, num_groups=1) for f in (compute, deep))
    assert deeper.memory_bytes <= 1.2 * shallow.memory_bytes  # type: ignore[union-attr]


@torch.inference_mode()
def test_what_is_no_operator_is_not_recorded(backend: CpuBackend) -> None:
    compute = TinyStep(backend)

    def with_torch(token_ids: torch.Tensor, plans: Any, indices: torch.Tensor) -> torch.Tensor:
        return compute(token_ids, plans, indices) * 2

    def of_other_tokens(token_ids: torch.Tensor, plans: Any, indices: torch.Tensor) -> torch.Tensor:
        return compute(torch.tensor([1]), plans, indices)

    for strange in (with_torch, of_other_tokens):
        assert backend.record(strange, max_num_tokens=8, max_num_logits=2, num_groups=1) is None
    # And it runs its operators at once again.
    assert backend.embed(torch.tensor([3, 4]), compute.table).shape == (2, HIDDEN)


@torch.inference_mode()
def test_layers_of_each_group_read_their_own_tables(backend: CpuBackend) -> None:
    """Two layers keep the same keys and values in other blocks, and the second has a window."""
    layer, windowed = TinyStep(backend), dataclasses.replace(SPEC, window=4)
    pools = [torch.zeros_like(layer.kv) for _ in range(2)]

    def two_layers(token_ids: torch.Tensor, plans: tuple[Any, ...], indices: torch.Tensor) -> torch.Tensor:
        x = backend.embed(token_ids, layer.table)
        for plan, spec, pool in zip(plans, (SPEC, windowed), pools, strict=True):
            q = backend.rope_and_write_kv(backend.linear(x, layer.qkv), layer.rope, pool, plan, spec)
            x = backend.linear(backend.attention(q, pool, plan, spec), layer.out)
        return backend.logits(backend.select_rows(x, indices), layer.table)

    recorded = backend.record(two_layers, max_num_tokens=24, max_num_logits=2, num_groups=2)
    assert recorded is not None
    inputs = inputs_of(20)
    other = dataclasses.replace(
        inputs, slots=inputs.slots + 3 * BLOCK, block_tables=torch.tensor([[4, 5]])
    )  # blocks 4 and 5, in a table of another width
    plans = tuple(backend.plan_attention(rows, spec, BLOCK) for rows, spec in ((inputs, SPEC), (other, windowed)))
    token_ids, indices = torch.arange(20), torch.tensor([19, 3])
    logits = recorded(token_ids, plans, indices).clone()
    for pool, used in zip(pools, ([1, 2], [4, 5]), strict=True):
        assert [block for block in range(8) if pool[block].any()] == used
        pool.zero_()
    assert torch.equal(logits, two_layers(token_ids, plans, indices))
    with pytest.raises(ValueError, match="plans for 1 groups of layers; the step was recorded with 2"):
        recorded(token_ids, plans[:1], indices)


def parameters_of(count: int, temperature: float) -> DrawParameters:
    return DrawParameters(
        temperatures=torch.full((count,), temperature),
        top_ks=torch.zeros(count, dtype=torch.int32),
        top_ps=torch.full((count,), 0.9),
        min_ps=torch.zeros(count),
        seeds=torch.arange(count),
    )


@torch.inference_mode()
def test_a_step_of_decodes_in_one_call_equals_the_step_and_the_draw(backend: CpuBackend) -> None:
    """Rows whose tables stand anywhere, in arrays that are replaced, and that ask for one thing and for another."""
    layer = TinyStep(backend)
    layer.kv.copy_(torch.randn(layer.kv.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    recorded = backend.record(layer, max_num_tokens=8, max_num_logits=4, num_groups=1)
    assert recorded is not None
    small = np.array([[7, 7], [3, 4], [1, 2], [5, 6]], np.int64)
    wide = np.array([[9, 9, 9], [5, 6, 9], [9, 9, 9], [9, 9, 9], [1, 2, 9]], np.int64)
    greedy, warm = parameters_of(3, 0.0), parameters_of(3, 1.5)
    drawn = set()
    for tables, places, positions, parameters in (
        (small, [2, 3, 1], [17, 3, 31], greedy),
        (small, [2, 3, 1], [18, 4, 31], warm),
        (wide, [4, 1], [19, 16], parameters_of(2, 0.7)),
        (small, [1], [0], parameters_of(1, 0.0)),
    ):
        rows, count = [tables[place] for place in places], len(places)
        slots = [int(row[at // BLOCK]) * BLOCK + at % BLOCK for row, at in zip(rows, positions, strict=True)]
        inputs = AttentionInputs(
            num_rows=count,
            num_decode_rows=count,
            max_query_len=0,
            query_lens=[1] * count,
            context_lens=[at + 1 for at in positions],
            query_starts=torch.arange(count + 1),
            kv_lens=torch.tensor(positions) + 1,
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            block_tables=torch.from_numpy(np.stack(rows)),
        )
        token_ids = [5 + at for at in positions]
        plan = backend.plan_attention(inputs, SPEC, BLOCK)
        before = layer.kv.clone()
        logits = layer(torch.tensor(token_ids), (plan,), torch.arange(count))
        expected, kv = backend.draw(logits, parameters, inputs.positions + 1).tolist(), layer.kv.clone()
        layer.kv.copy_(before)
        recorded.start_decode(DecodeRows(token_ids, positions, [slots], [tables], [places]), parameters)
        assert recorded.finish_decode() == expected
        assert torch.equal(layer.kv, kv)
        drawn.update(expected)
    assert len(drawn) > 4


@torch.inference_mode()
def test_a_decode_says_which_row_is_nan_and_refuses_too_many(backend: CpuBackend) -> None:
    layer = TinyStep(backend)
    recorded = backend.record(layer, max_num_tokens=8, max_num_logits=2, num_groups=1)
    assert recorded is not None
    layer.kv[2] = float("nan")
    tables = np.array([[1], [2]], np.int64)
    slots = [[BLOCK + 3, 2 * BLOCK + 3]]
    recorded.start_decode(DecodeRows([1, 2], [3, 3], slots, [tables], [[0, 1]]), parameters_of(2, 1.0))
    drawn = recorded.finish_decode()
    assert drawn[0] >= 0
    assert drawn[1] == -1
    with pytest.raises(ValueError, match="3 decodes is larger than what was recorded"):
        recorded.start_decode(DecodeRows([1] * 3, [3] * 3, [[BLOCK] * 3], [tables], [[0] * 3]), parameters_of(3, 1.0))


@torch.inference_mode()
def test_blocks_that_native_code_cannot_read_are_refused(backend: CpuBackend) -> None:
    layer = TinyStep(backend)
    layer.kv = torch.zeros(8, 2, 2, 8, 16, dtype=backend.dtype)
    with pytest.raises(ValueError, match="in blocks of 8"):
        layer(torch.arange(3), (backend.plan_attention(inputs_of(3), SPEC, 8),), torch.tensor([2]))


@torch.inference_mode()
def test_operators_of_families_equal_the_reference(backend: CpuBackend) -> None:
    oracle = ReferenceBackend(CPU, backend.dtype)
    torch.manual_seed(0)
    close = {"rtol": 2e-2, "atol": 2e-2} if backend.dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    rows, residual = (torch.randn(6, HIDDEN).to(backend.dtype) for _ in range(2))
    ids, norm = torch.tensor([3, 90, 0]), Weight(HIDDEN)

    def found(b: CpuBackend | ReferenceBackend) -> dict[str, torch.Tensor]:
        table = b.pack_embedding(Weight(VOCAB, HIDDEN))
        offset, parts = b.pack_vector(norm, 1.0), [b.pack_vector(Weight(24)), b.pack_vector(Weight(16))]
        normed, total = b.add_rms_norm(rows.clone(), residual.clone(), offset, 1e-6, 0.22)
        return {
            "embed": b.embed(ids, table, 27.7),
            "norm": b.rms_norm(rows, offset, 1e-6),
            "normed sum": normed,
            "sum": total,
            "add": b.add(rows.clone(), residual.clone(), 0.22),
            "parts": b.norm_parts(rows.clone(), parts, 1e-6),
            "logits": b.logits(rows, table, scale=0.5, soft_cap=3.0).float(),
            **{kind: b.gated(rows, kind) for kind in ("silu", "gelu", "gelu_tanh")},  # type: ignore[arg-type]
        }

    expected = found(oracle)
    for name, values in found(backend).items():
        torch.testing.assert_close(values, expected[name], **close, msg=lambda text, name=name: f"{name}: {text}")
    # A scale that both hold exactly gives the same bits: there is one rounding, of the sum.
    sums = [b.add(rows.clone(), residual.clone(), 0.25) for b in (backend, oracle)]
    assert torch.equal(*sums)


@torch.inference_mode()
def test_a_step_larger_than_the_recording_is_refused(backend: CpuBackend) -> None:
    recorded = backend.record(TinyStep(backend), max_num_tokens=8, max_num_logits=2, num_groups=1)
    assert recorded is not None
    plans = (backend.plan_attention(inputs_of(9), SPEC, BLOCK),)
    with pytest.raises(ValueError, match="larger than what was recorded"):
        recorded(torch.arange(9), plans, torch.tensor([8]))


def test_packed_weights_are_counted_as_they_are_kept(backend: CpuBackend) -> None:
    weights = [("F32", (VOCAB, HIDDEN)), ("F32", (HIDDEN,))]
    packed = backend.pack_linear([Weight(VOCAB, HIDDEN)]).matrix.nbytes
    assert backend.weight_bytes(weights) == packed + HIDDEN * 4
    for shape in ((4096, 4096), (1, 4096, 4096)):  # the second is an expert's, kept as any
        assert backend.weight_bytes([("Q4_0", shape)]) == 4096 * 4096 * 18 // 32


def test_selection_says_why_plain_torch_serves() -> None:
    assert label(select_backend("auto", CPU, torch.bfloat16, 64)).startswith("cpu (")
    assert fallback_note("auto", CPU, torch.bfloat16, 64) is None
    for dtype, head_dim, why in ((torch.float16, 64, "float16"), (torch.float32, 24, "heads of 24")):
        assert select_backend("auto", CPU, dtype, head_dim).name == "reference"
        assert why in str(fallback_note("auto", CPU, dtype, head_dim))
        with pytest.raises(ValueError, match=why):
            select_backend("cpu", CPU, dtype, head_dim)
    assert fallback_note("reference", CPU, torch.float16, 64) is None
