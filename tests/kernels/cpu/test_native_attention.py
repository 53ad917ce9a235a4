"""Attention, rotation and writing of K/V in native code, against float64 written out; and that a row's bits depend on
nothing but the row."""

from __future__ import annotations

import ctypes
import functools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from octavo.kernels.cpu.library import Attention, Group, NativeContext, Op, OpKind, Step, supported_isas

pytestmark = pytest.mark.skipif(not supported_isas(), reason="the native library was not built")

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}
"""Of ‖found - expected‖ / ‖expected‖."""
VARIANTS = [(isa, dtype) for isa in supported_isas() for dtype in DTYPES if (isa, dtype) != ("amx", torch.float32)]
"""In float32 the amx variant is the code of avx512."""
everywhere = pytest.mark.parametrize(("isa", "dtype"), VARIANTS, ids=str)


@functools.cache
def context(isa: str, dtype: torch.dtype, num_threads: int) -> NativeContext:
    return NativeContext(dtype, num_threads, isa)


@dataclass(frozen=True)
class Shape:
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    block_size: int = 32
    window: int = 0
    soft_cap: float = 0.0

    def native(self, **changes: float) -> Attention:
        fields = dict(vars(self), scale=self.head_dim**-0.5)
        return Attention(**(fields | changes))


@dataclass
class Tokens:
    """Random merged projections of whole sequences, [length, heads + 2 * kv_heads, head_dim] each."""

    shape: Shape
    merged: list[torch.Tensor]

    @classmethod
    def random(cls, shape: Shape, lengths: Sequence[int], dtype: torch.dtype, seed: int) -> Tokens:
        generator = torch.Generator().manual_seed(seed)
        heads = shape.num_heads + 2 * shape.num_kv_heads
        rows = [torch.randn(length, heads, shape.head_dim, generator=generator) * 1.5 for length in lengths]
        return cls(shape, [row.to(dtype) for row in rows])

    @property
    def lengths(self) -> list[int]:
        return [row.shape[0] for row in self.merged]

    def expected(self) -> list[torch.Tensor]:
        """float64 [length, heads * head_dim] of each sequence."""
        shape = self.shape
        group = shape.num_heads // shape.num_kv_heads
        results = []
        for merged in self.merged:
            q, k, v = merged.double().split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
            scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * shape.head_dim**-0.5
            if shape.soft_cap:
                scores = shape.soft_cap * (scores / shape.soft_cap).tanh()
            position = torch.arange(merged.shape[0])
            distance = position[:, None] - position
            hidden = (distance < 0) | ((distance >= shape.window) if shape.window else False)
            weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
            result = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1))
            results.append(result.flatten(1))
        return results


class Pool:
    """One layer of K/V, NaN wherever nothing was written, and sequences that advance through it."""

    def __init__(self, tokens: Tokens, native: NativeContext, seed: int = 0) -> None:
        self.tokens, self.native, self.shape = tokens, native, tokens.shape
        size = self.shape.block_size
        counts = [-(-length // size) for length in tokens.lengths]
        blocks = list(range(1, sum(counts) + 1))
        random.Random(seed).shuffle(blocks)
        # Tables are padded with block 0, which is NaN throughout.
        self.tables = torch.zeros(len(counts), max(counts) + 1, dtype=torch.int64)
        for row, count in enumerate(counts):
            self.tables[row, :count] = torch.tensor([blocks.pop() for _ in range(count)])
        width = (sum(counts) + 1) * 2 * self.shape.num_kv_heads * size * self.shape.head_dim
        # One element off, so that nothing is aligned.
        self.layer = torch.full((width + 1,), math.nan, dtype=native.dtype)[1:]
        self.rope = torch.cat([torch.ones(max(tokens.lengths), self.shape.head_dim // 2)] * 2, 1)
        self.rope[:, self.shape.head_dim // 2 :] = 0
        self.done = [0] * len(counts)
        self.out = [torch.empty_like(row[:, : self.shape.num_heads]).flatten(1) for row in tokens.merged]

    def step(self, counts: Iterable[tuple[int, int]]) -> None:
        """Compute so many further tokens of so many sequences."""
        counts = sorted(counts, key=lambda pair: pair[1] > 1)
        size, rows = self.shape.block_size, [row for row, _ in counts]
        positions = [torch.arange(self.done[row], self.done[row] + count) for row, count in counts]
        slots = [
            self.tables[row, at // size] * size + at % size for (row, _), at in zip(counts, positions, strict=True)
        ]
        merged = torch.cat([self.tokens.merged[row][at] for (row, _), at in zip(counts, positions, strict=True)])
        merged = merged.flatten(1)
        starts = torch.tensor([0, *(count for _, count in counts)]).cumsum(0)
        tables, position, slot = self.tables[rows].contiguous(), torch.cat(positions), torch.cat(slots)
        kv_lens = torch.tensor([self.done[row] + count for row, count in counts])
        step = Step(
            num_tokens=merged.shape[0],
            num_rows=len(counts),
            num_decode_rows=sum(count == 1 for _, count in counts),
            positions=position.data_ptr(),
            query_starts=starts.data_ptr(),
            kv_lens=kv_lens.data_ptr(),
            groups=ctypes.pointer(Group(slot.data_ptr(), tables.data_ptr(), tables.stride(0))),
        )
        q_width = self.shape.num_heads * self.shape.head_dim
        q, out = merged.new_empty(merged.shape[0], q_width), merged.new_empty(merged.shape[0], q_width + 3)
        self.native.run(self.operators(merged, q, out), step)
        for (row, _), part, at in zip(counts, out[:, :q_width].split([n for _, n in counts]), positions, strict=True):
            self.out[row][at] = part
            self.done[row] += len(at)
            self.forget(row)

    def forget(self, row: int) -> None:
        """Give up the blocks that a window has left: another sequence may write NaN there."""
        gone = max(0, self.done[row] - self.shape.window + 1) // self.shape.block_size if self.shape.window else 0
        blocks = self.layer.view(-1, 2 * self.shape.num_kv_heads * self.shape.block_size * self.shape.head_dim)
        blocks[self.tables[row, :gone]] = math.nan
        self.tables[row, :gone] = 0

    def operators(self, merged: torch.Tensor, q: torch.Tensor, out: torch.Tensor) -> list[Op]:
        native = self.shape.native()
        shape = ctypes.pointer(native)
        write = Op(kind=OpKind.ROPE_WRITE, a=merged.data_ptr(), out=q.data_ptr(), out2=self.layer.data_ptr())
        write.weight, write.spec, write.n[0] = self.rope.data_ptr(), shape, self.shape.head_dim
        write.stride_a, write.stride_out = merged.stride(0), q.stride(0)
        attend = Op(kind=OpKind.ATTENTION, a=q.data_ptr(), out=out.data_ptr(), out2=self.layer.data_ptr(), spec=shape)
        attend.stride_a, attend.stride_out = q.stride(0), out.stride(0)
        return [write, attend]


def in_one_step(tokens: Tokens, native: NativeContext, seed: int = 0) -> list[torch.Tensor]:
    pool = Pool(tokens, native, seed)
    pool.step(enumerate(tokens.lengths))
    return pool.out


def one_by_one(tokens: Tokens, native: NativeContext) -> list[torch.Tensor]:
    """A token per step: the first sequence alone, then the others together."""
    pool = Pool(tokens, native, seed=1)
    for _ in range(tokens.lengths[0]):
        pool.step([(0, 1)])
    while rows := [row for row, length in enumerate(tokens.lengths) if pool.done[row] < length]:
        pool.step([(row, 1) for row in rows])
    return pool.out


def in_random_steps(tokens: Tokens, native: NativeContext, seed: int) -> list[torch.Tensor]:
    pool, choose = Pool(tokens, native, seed), random.Random(seed)
    while any(done < length for done, length in zip(pool.done, tokens.lengths, strict=True)):
        left = [(row, length - pool.done[row]) for row, length in enumerate(tokens.lengths)]
        counts = [(row, choose.choice((1, 1, choose.randint(1, n)))) for row, n in left if n and choose.random() < 0.8]
        if counts:
            pool.step(counts)
    return pool.out


def assert_same_bits(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for row, (a, b) in enumerate(zip(found, expected, strict=True)):
        same = a.view(torch.uint8).view(a.shape[0], -1).eq(b.view(torch.uint8).view(a.shape[0], -1)).all(1)
        assert same.all(), f"sequence {row} differs at {(~same).nonzero().flatten().tolist()[:20]}"


def assert_close(found: list[torch.Tensor], tokens: Tokens) -> None:
    for result, expected in zip(found, tokens.expected(), strict=True):
        error = (result.double() - expected).norm() / expected.norm()
        assert error < TOLERANCE[result.dtype]


shapes = st.builds(
    lambda kv, group, dim, size, window, cap: Shape(kv * group, kv, dim, size, window, cap),
    st.sampled_from((1, 2, 3)),
    st.sampled_from((1, 2, 3, 5, 16, 20)),
    st.sampled_from((16, 64, 80, 96, 128, 256)),
    st.sampled_from((16, 32, 64)),
    st.sampled_from((0, 0, 1, 7, 40, 300)),
    st.sampled_from((0.0, 0.0, 5.0)),
)


@everywhere
@settings(max_examples=8, deadline=None)
@given(shape=shapes, lengths=st.lists(st.integers(1, 330), min_size=1, max_size=4), seed=st.integers(0, 2**16))
def test_equals_attention_written_out(
    isa: str, dtype: torch.dtype, shape: Shape, lengths: list[int], seed: int
) -> None:
    tokens = Tokens.random(shape, lengths, dtype, seed)
    assert_close(in_one_step(tokens, context(isa, dtype, 2), seed), tokens)


@everywhere
@settings(max_examples=6, deadline=None)
@example(shape=Shape(), lengths=[275, 20], seed=0)
@given(shape=shapes, lengths=st.lists(st.integers(1, 80), min_size=1, max_size=3), seed=st.integers(0, 2**16))
def test_bits_do_not_depend_on_batch_chunks_blocks_or_threads(
    isa: str, dtype: torch.dtype, shape: Shape, lengths: list[int], seed: int
) -> None:
    tokens = Tokens.random(shape, lengths, dtype, seed)
    alone = one_by_one(tokens, context(isa, dtype, 1))
    assert_close(alone, tokens)
    assert_same_bits(in_one_step(tokens, context(isa, dtype, 1), seed), alone)
    assert_same_bits(in_one_step(tokens, context(isa, dtype, 2), seed + 1), alone)
    assert_same_bits(in_random_steps(tokens, context(isa, dtype, 2), seed), alone)
    assert_same_bits(in_random_steps(tokens, context(isa, dtype, 3), seed + 1), alone)


@everywhere
@pytest.mark.parametrize("window", [0, 700])
def test_long_sequences_are_split_without_a_trace(isa: str, dtype: torch.dtype, window: int) -> None:
    tokens = Tokens.random(Shape(window=window), [1500, 3], dtype, seed=5)
    whole = in_one_step(tokens, context(isa, dtype, 1))
    assert_close(whole, tokens)
    for num_threads in (1, 2, 5):
        pool = Pool(tokens, context(isa, dtype, num_threads), seed=num_threads)
        pool.step([(0, 1495)])
        pool.step([(0, 1), (1, 1)])
        pool.step([(0, 3), (1, 1)])
        pool.step([(0, 1), (1, 1)])
        assert_same_bits(pool.out, whole)


@everywhere
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_key_without_a_finite_value_reaches_only_who_sees_it(isa: str, dtype: torch.dtype, bad: float) -> None:
    shape = Shape(window=50)
    tokens = Tokens.random(shape, [265], dtype, seed=3)
    expected = in_one_step(tokens, context(isa, dtype, 1))[0]
    for position in (33, 254):
        spoilt = Tokens(shape, [tokens.merged[0].clone()])
        spoilt.merged[0][position, shape.num_heads :] = bad
        found = in_one_step(spoilt, context(isa, dtype, 2))
        assert_same_bits(one_by_one(spoilt, context(isa, dtype, 1)), found)
        sees = torch.zeros(265, dtype=torch.bool)
        sees[position : position + shape.window] = True
        assert_same_bits([found[0][~sees]], [expected[~sees]])
        assert not found[0][sees].isfinite().any()


@everywhere
def test_a_row_without_keys_gives_zeros(isa: str, dtype: torch.dtype) -> None:
    shape = Shape()
    q, out = torch.randn(1, 576).to(dtype), torch.full((1, 576), math.nan, dtype=dtype)
    starts, kv_lens, table = torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1, 1, dtype=torch.int64)
    step = Step(num_tokens=1, num_rows=1, query_starts=starts.data_ptr(), kv_lens=kv_lens.data_ptr())
    step.groups = ctypes.pointer(Group(block_tables=table.data_ptr(), table_stride=1))
    native = shape.native()
    op = Op(kind=OpKind.ATTENTION, a=q.data_ptr(), out=out.data_ptr(), out2=q.data_ptr(), spec=ctypes.pointer(native))
    op.stride_a = op.stride_out = 576
    context(isa, dtype, 2).run([op], step)
    assert torch.equal(out, torch.zeros_like(out))


@everywhere
def test_rows_of_no_tokens_are_passed_over(isa: str, dtype: torch.dtype) -> None:
    tokens = Tokens.random(Shape(), [40, 7], dtype, seed=9)
    pool = Pool(tokens, context(isa, dtype, 2))
    pool.step([(0, 40), (1, 0)])
    pool.step([(0, 0), (1, 7)])
    assert_same_bits(pool.out, in_one_step(tokens, context(isa, dtype, 1)))


def test_says_which_shapes_are_supported() -> None:
    supported = context(*VARIANTS[0], 1).library.ov_attention_supported

    def supports(shape: Shape, **changes: float) -> bool:
        return bool(supported(ctypes.byref(shape.native(**changes))))

    for head_dim in range(16, 513, 16):
        for block_size in (16, 32, 64):
            assert supports(Shape(head_dim=head_dim, block_size=block_size))
    assert not supports(Shape(head_dim=72))
    assert not supports(Shape(head_dim=528))
    assert not supports(Shape(num_heads=8))
    assert not supports(Shape(block_size=24))
    assert not supports(Shape(), scale=0.0)


@pytest.mark.parametrize("num_threads", [1, 2, 64])
def test_the_estimate_of_memory_covers_every_batch(num_threads: int) -> None:
    library = context(*VARIANTS[0], 1).library
    library.ov_attention_workspace.restype = ctypes.c_int64
    shape = Shape().native()
    estimate = [
        library.ov_attention_workspace(ctypes.byref(shape), ctypes.c_int64(length), ctypes.c_int64(num_threads))
        for length in (1, 2048, 131072)
    ]
    assert sorted(estimate) == estimate
    assert estimate[-1] <= 16 * 2**20 + num_threads * 2**18


@pytest.mark.parametrize(("sources", "targets"), [([1, 2], [4, 5]), ([1, 2, 3], [2, 3, 1]), ([7], [7]), ([], [])])
def test_copies_blocks_as_if_all_at_once(sources: list[int], targets: list[int]) -> None:
    library = context(*VARIANTS[0], 1).library
    pool = torch.randint(0, 256, (3, 8, 96), dtype=torch.uint8)
    expected = pool.clone()
    expected[:, targets] = pool[:, sources]
    ids = [(ctypes.c_int64 * len(blocks))(*blocks) for blocks in (sources, targets)]
    sizes = [ctypes.c_int64(size) for size in (3, 8 * 96, 96)]
    status = library.ov_copy_blocks(ctypes.c_void_p(pool.data_ptr()), *sizes, *ids, ctypes.c_int64(len(sources)))
    assert status == 0
    assert torch.equal(pool, expected)
