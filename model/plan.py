"""What fits in memory: the server's own arithmetic, asked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ..kernels.select import fallback_note, label, select_backend
from .header import ModelHeader
from .kv_layout import KvLayout
from .memory import CachePlan, FreeMemory, cache_request, fit_cache
from .sizes import size_text
from .spec import ModelError

KV_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The types that the server can keep K/V in; activations and weights then have the same."""
MOST_SEQS = 65536
"""Of sequences at once: what the server accepts as max-num-seqs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What is planned with: the server's settings, and the questions."""

    device: torch.device
    free: FreeMemory
    """Before the start: the weights are not loaded yet."""
    dtype: torch.dtype
    kernel_backend: str
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int | None
    kv_cache_memory: int | None
    context: int | None
    """Tokens of the sequences whose largest number is asked for. None: as long as the server lets them grow."""
    concurrency: int | None
    """Sequences whose largest length is asked for. None: one."""


@dataclass(frozen=True, slots=True)
class Limit:
    """An answer, and what stands in the way of a larger one."""

    value: int
    """0: not even one."""
    by: Literal["memory", "model", "max-num-batched-tokens", "max-num-seqs"]
    """model: it was trained for no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DtypePlan:
    """What one dtype comes to."""

    dtype: torch.dtype
    weight_bytes: int
    kv_bytes_per_token: int
    """All layers; of windowed ones only while the token is in the window."""
    cache: CachePlan | None
    """What the server would do with the settings as they are. None: it would not start."""
    refusal: str | None
    """Why it would not."""
    longest_context: Limit
    """For the asked concurrency."""
    most_sequences: Limit
    """At the asked context."""

    @property
    def name(self) -> str:
        return _name(self.dtype)

    @property
    def num_blocks(self) -> int:
        """As the server counts them: of all pools, without their blocks 0, which are nobody's."""
        return sum(self.pool_blocks)

    @property
    def pool_blocks(self) -> list[int]:
        """The same, of each pool: layers that keep everything first, then those with a window."""
        return [] if self.cache is None else self.cache.usable_blocks


@dataclass(frozen=True, slots=True)
class FitColumn:
    """Sequences of one length."""

    context: int
    sequence_bytes: int
    """Of the blocks that one of them holds."""
    most_sequences: int
    """With the chosen dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    header: ModelHeader
    request: PlanRequest
    backend_name: str
    backend_note: str | None
    """Why it is not the one made for the device."""
    context: int
    """As asked; else what the server lets a sequence grow to."""
    concurrency: int
    chosen: DtypePlan
    """The plan with the asked dtype; its `cache` is not None."""
    by_dtype: tuple[DtypePlan, ...]
    columns: tuple[FitColumn, ...]
    concurrencies: tuple[int, ...]

    @property
    def num_running(self) -> int:
        """Sequences that the server runs at once: decodes alone never exceed a step."""
        return min(self.request.max_num_seqs, self.request.max_num_batched_tokens)

    @property
    def fits(self) -> bool:
        """Whether the server, as it is planned, holds the asked concurrency at the asked context."""
        return self.holds(self.concurrency, self.context)

    def holds(self, num_seqs: int, context: int) -> bool:
        """Whether the planned pools hold so many sequences of that length at once. Pools that are sized for more
        sequences, or longer ones, may be smaller: `most_sequences` and `longest_context` are not about these."""
        return num_seqs <= self.num_running and _hold(
            self.cache, self.header.kv_layout, self.request, num_seqs, context
        )

    @property
    def cache(self) -> CachePlan:
        """The server's pool with the asked dtype."""
        assert self.chosen.cache is not None
        return self.chosen.cache


def plan_model(header: ModelHeader, request: PlanRequest) -> ModelPlan:
    """Plan one model. Raises ModelError where the server would not start: too little memory, or a context that the
    model does not have."""
    planners = {dtype: _Planner(header, request, dtype) for dtype in KV_DTYPES}
    chosen = planners[request.dtype]
    try:
        cache = chosen.serve()
    except _WeightsDoNotFit as error:
        raise ModelError(f"{error}; {_what_would_fit(request, planners)}") from None
    context = request.context or cache.max_model_len
    concurrency = request.concurrency or 1
    by_dtype = tuple(planner.plan(context, concurrency) for planner in planners.values())
    return ModelPlan(
        header=header,
        request=request,
        backend_name=label(chosen.backend),
        backend_note=fallback_note(request.kernel_backend, request.device, request.dtype, header.spec.head_dim),
        context=context,
        concurrency=concurrency,
        chosen=by_dtype[KV_DTYPES.index(request.dtype)],
        by_dtype=by_dtype,
        columns=tuple(
            FitColumn(length, chosen.sequence_bytes(length), chosen.most_sequences(length).value)
            for length in _contexts(header.spec.max_position_embeddings)
        ),
        concurrencies=tuple(2**power for power in range(9)),
    )


def _contexts(trained_len: int) -> list[int]:
    """Up to eight powers of two below what the model was trained for, and that itself."""
    powers = [2**power for power in range(5, trained_len.bit_length()) if 2**power < trained_len]
    return [*powers[-7:], trained_len]


class _WeightsDoNotFit(ModelError):
    pass


class _Planner:
    """One model with one dtype; every answer is what `fit_cache` says to the settings it stands for."""

    def __init__(self, header: ModelHeader, request: PlanRequest, dtype: torch.dtype) -> None:
        """Raises ModelError for an unknown backend."""
        try:
            self.backend = select_backend(request.kernel_backend, request.device, dtype, header.spec.head_dim)
        except ValueError as error:
            raise ModelError(str(error)) from error
        self._header = header
        self._request = request
        self._dtype = dtype
        self.weight_bytes = (
            header.num_parameters * dtype.itemsize
            if header.weights is None
            else self.backend.weight_bytes(header.weights)
        )
        self._free = request.free.less(self.weight_bytes)

    @property
    def keeps_quantised(self) -> bool:
        """Whether the backend multiplies quantised weights as they are stored."""
        sample = (2**16, 2**14)
        return self.backend.weight_bytes([("Q4_0", sample)]) < math.prod(sample) * self._dtype.itemsize

    def sequence_bytes(self, context: int) -> int:
        return self._header.kv_layout.sequence_bytes(context, self._request.block_size, self._dtype.itemsize)

    def serve(self) -> CachePlan:
        """The pool with the settings as they are. Raises ModelError."""
        return self._fit(self._request.max_num_seqs, self._request.max_model_len)

    def plan(self, context: int, concurrency: int) -> DtypePlan:
        cache, refusal = None, None
        try:
            cache = self.serve()
        except ModelError as error:
            refusal = str(error)
        return DtypePlan(
            dtype=self._dtype,
            weight_bytes=self.weight_bytes,
            kv_bytes_per_token=self._header.kv_layout.block_bytes(1, self._dtype.itemsize),
            cache=cache,
            refusal=refusal,
            longest_context=self.longest_context(concurrency),
            most_sequences=self.most_sequences(context),
        )

    def most_sequences(self, context: int) -> Limit:
        """The largest N such that `--max-num-seqs N --max-model-len context` holds N sequences of that length at once.

        More sequences need more blocks, and leave fewer: their logits take memory too. So one search finds the edge.
        """
        by_step = self._request.max_num_batched_tokens < MOST_SEQS
        limit = min(MOST_SEQS, self._request.max_num_batched_tokens)
        most = _largest(limit, lambda number: self._holds(number, context))
        return Limit(most, "memory" if most < limit else "max-num-batched-tokens" if by_step else "max-num-seqs")

    def longest_context(self, concurrency: int) -> Limit:
        """The largest T such that `--max-num-seqs concurrency --max-model-len T` holds so many sequences of T tokens
        at once."""
        if concurrency > self._request.max_num_batched_tokens:
            return Limit(0, "max-num-batched-tokens")
        trained_len = self._header.spec.max_position_embeddings
        longest = _largest(trained_len, lambda length: self._holds(concurrency, length))
        return Limit(longest, "memory" if longest < trained_len else "model")

    def _holds(self, num_seqs: int, context: int) -> bool:
        """What `ModelPlan.holds` says with these two settings."""
        if num_seqs > self._request.max_num_batched_tokens:
            return False  # no more run at once
        try:
            cache = self._fit(num_seqs, context)
        except ModelError:
            return False
        return _hold(cache, self._header.kv_layout, self._request, num_seqs, context)

    def _fit(self, max_num_seqs: int, max_model_len: int | None) -> CachePlan:
        missing = self.weight_bytes - self._request.free.free_bytes
        if missing > 0:
            raise _WeightsDoNotFit(
                f"the weights take {size_text(self.weight_bytes)} in {_name(self._dtype)}, {size_text(missing)} more "
                f"than the {size_text(self._request.free.free_bytes)} of memory that are free"
            )
        request = cache_request(
            self._header.spec,
            self.backend,
            block_size=self._request.block_size,
            kv_cache_memory=self._request.kv_cache_memory,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_num_batched_tokens=self._request.max_num_batched_tokens,
        )
        return fit_cache(self._header.spec, self._header.kv_layout, request, self._free)


def _hold(cache: CachePlan, layout: KvLayout, request: PlanRequest, num_seqs: int, context: int) -> bool:
    """Whether pools hold so many sequences of `context` tokens at once, while a step computes a part of a prompt."""
    block_size, step_tokens = request.block_size, request.max_num_batched_tokens
    return context <= cache.max_model_len and all(
        group.layer.blocks_of_sequences(num_seqs, context, block_size, step_tokens) < pool.num_blocks
        for group, pool in zip(layout.groups, cache.pools, strict=True)
    )


def _largest(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest of 0 to `limit` that holds, where everything below one that holds does too."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _what_would_fit(request: PlanRequest, planners: dict[torch.dtype, _Planner]) -> str:
    """How to mend that the weights do not fit."""
    fitting: list[str] = []
    almost = ""
    for dtype, planner in planners.items():
        try:
            planner.serve()
            fitting.append(f"--dtype {_name(dtype)}")
        except _WeightsDoNotFit:
            continue
        except ModelError as error:
            almost = f"with --dtype {_name(dtype)}, {error}"
    if fitting:
        return f"{' or '.join(fitting)} would fit"
    if almost:
        return almost
    planner = planners[request.dtype]
    if planner.keeps_quantised:
        return "no dtype fits; choose a smaller model, a file of fewer bits per weight (GGUF), or more memory"
    most = request.free.free_bytes // min(dtype.itemsize for dtype in KV_DTYPES)
    return (
        f"no dtype fits, nor would a quantised file, because the {planner.backend.name} backend keeps weights "
        f"unquantised; choose a model of less than {most / 1e9:.1f} billion parameters, or more memory"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
