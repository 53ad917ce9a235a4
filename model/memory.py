"""How large the K/V pool is, and how long a sequence may therefore be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
import torch

from ..kernels.backend import KernelBackend
from .kv_layout import KvLayout, kv_layout
from .layer_groups import layer_groups
from .pool_split import PoolSplit
from .spec import ModelError, ModelSpec

_CPU_FRACTION = 0.5
"""Share of the memory that is free when the pool is sized; the rest serves activations and everything else."""
_CUDA_FRACTION = 0.92
_MIN_USABLE_BLOCKS = 4
DEFAULT_BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}
"""Token budget of one step where the user gives none, by kind of device."""
_GIB = 2**30
_OUT_OF_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """One layer group's pool."""

    num_blocks: int
    """Block 0, which no sequence owns, included."""
    window: int | None
    """Of its layers. None: they see everything."""


@dataclass(frozen=True, slots=True)
class CachePlan:
    """What the pools turned out to be."""

    pools: tuple[PoolPlan, ...]
    """In the order of the layout's groups."""
    max_model_len: int
    """Tokens of one sequence at most: asked for or trained for, and no more than the pool holds."""
    kv_cache_bytes: int
    notes: tuple[str, ...] = ()
    """Lines a user should see: what was fitted, and how to get more."""

    @property
    def usable_blocks(self) -> list[int]:
        """Of each pool, without block 0: as the server counts them."""
        return [pool.num_blocks - 1 for pool in self.pools]

    @property
    def num_usable_blocks(self) -> int:
        return sum(self.usable_blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRequest:
    """What the pool is to serve."""

    block_size: int
    dtype: torch.dtype
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_memory: int | None = None
    """Bytes. None: from the free memory."""
    max_model_len: int | None = None
    """None: what the model was trained for."""
    attention_bytes: Callable[[int], int] = lambda num_tokens: 0
    """What attention allocates in one step whose longest sequence has so many tokens; the backend knows."""
    step_bytes: int | None = None
    """What one step allocates, measured. None: estimated from the shapes."""


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """What a device has to give; its kind decides which share of it the pool may take."""

    device_type: Literal["cpu", "cuda"]
    free_bytes: int
    total_bytes: int
    """Of the whole device."""

    def less(self, num_bytes: int) -> FreeMemory:
        """What is free once so many bytes more are taken."""
        return replace(self, free_bytes=max(0, self.free_bytes - num_bytes))


def cache_request(
    spec: ModelSpec,
    backend: KernelBackend,
    *,
    block_size: int,
    kv_cache_memory: int | None,
    max_num_seqs: int,
    max_model_len: int | None,
    max_num_batched_tokens: int,
) -> CacheRequest:
    """The request of a model that runs on `backend`."""
    groups = layer_groups(spec)
    return CacheRequest(
        block_size=block_size,
        dtype=backend.dtype,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory=kv_cache_memory,
        max_model_len=max_model_len,
        attention_bytes=lambda num_tokens: sum(
            backend.attention_workspace_bytes(
                group.attention, block_size, max_num_batched_tokens, max_num_seqs, num_tokens
            )
            for group in groups
        ),
    )


def plan_cache(spec: ModelSpec, request: CacheRequest, device: torch.device) -> CachePlan:
    """Size the pool by what is free on `device` now, the weights being loaded already. See `fit_cache`."""
    return fit_cache(spec, kv_layout(spec), request, free_memory(device))


def fit_cache(spec: ModelSpec, layout: KvLayout, request: CacheRequest, free: FreeMemory) -> CachePlan:
    """Size the pool in memory of which the weights are taken already. Depends on its arguments only.

    Raises ModelError when not even a few blocks fit, when more is asked for than is free, or for a context the model
    does not have.
    """
    wanted_len = _wanted_len(spec, request)
    split = PoolSplit(
        layout=layout,
        block_size=request.block_size,
        itemsize=request.dtype.itemsize,
        max_num_seqs=request.max_num_seqs,
        max_model_len=wanted_len,
        step_tokens=request.max_num_batched_tokens,
    )
    if request.kv_cache_memory is not None:
        budget = request.kv_cache_memory
    else:
        # No more than what is needed, and as much of windows again for cached prefixes.
        budget = _free_budget(spec, layout, request, wanted_len, free)
        budget = min(budget, split.num_bytes(split.blocks(2 * split.mark)))
    if request.max_model_len is not None:
        split = replace(split, must_fit=split.longest_that_fits(budget))
    blocks = split.largest(budget)
    needed = split.of_sequence(min(wanted_len, _MIN_USABLE_BLOCKS * request.block_size))
    if not blocks or any(count < least for count, least in zip(blocks, needed, strict=True)):
        raise ModelError(_too_small(request, budget, split.num_bytes(split.blocks(max(needed)))))
    num_bytes, max_model_len = split.num_bytes(blocks), split.longest_sequence(blocks)
    if request.kv_cache_memory is not None:
        _check_free(num_bytes, free)
    notes: tuple[str, ...] = ()
    if max_model_len < wanted_len:
        notes = (
            f"the KV cache of {num_bytes / _GIB:.2f} GiB holds {max_model_len} tokens, so sequences are "
            f"limited to that instead of {wanted_len}; a larger kv-cache-memory lifts the limit"
            + _longer_on_request(split.longest_that_fits(budget), max_model_len),
        )
    pools = tuple(PoolPlan(count + 1, group.layer.window) for count, group in zip(blocks, layout.groups, strict=True))
    return CachePlan(pools, max_model_len, num_bytes, notes)


def _longer_on_request(longest: int, max_model_len: int) -> str:
    """Windows are divided for many sequences, unless a long one is asked for."""
    if longest <= max_model_len:
        return ""
    return f", and a max-model-len of up to {longest} does, at the cost of how many run at once"


def longest_possible(spec: ModelSpec, request: CacheRequest, device: torch.device) -> int:
    """Tokens that no sequence will exceed, whatever else takes memory. Raises ModelError as `fit_cache` does."""
    wanted_len = _wanted_len(spec, request)
    share = _share(free_memory(device))
    return max(1, kv_layout(spec).longest_sequence(share, 1, request.dtype.itemsize, wanted_len))


def _wanted_len(spec: ModelSpec, request: CacheRequest) -> int:
    trained_len = spec.max_position_embeddings
    wanted_len = request.max_model_len if request.max_model_len is not None else trained_len
    if wanted_len < 1:
        raise ModelError(f"max_model_len must be at least 1, not {wanted_len}")
    if wanted_len > trained_len:
        raise ModelError(f"max_model_len {wanted_len} exceeds the {trained_len} positions that the model knows")
    return wanted_len


def _too_small(request: CacheRequest, budget: int, needed: int) -> str:
    have = f"{budget / 2**20:.1f} MiB"
    need = f"{math.ceil(10 * needed / 2**20) / 10:.1f} MiB"
    if request.kv_cache_memory is not None:
        return f"kv-cache-memory of {have} holds too few blocks of {request.block_size} tokens; give at least {need}"
    return (
        f"only {have} of memory is left for the KV cache and {need} is the least that serves; free some memory, "
        f"or choose a smaller model or dtype{_smaller_steps(request)}"
    )


def _smaller_steps(request: CacheRequest) -> str:
    if request.step_bytes is None:
        return ""
    return (
        f"; the largest step takes {request.step_bytes / 2**20:.1f} MiB, "
        "less with a smaller max-num-batched-tokens or max-num-seqs"
    )


def _check_free(num_bytes: int, free: FreeMemory) -> None:
    if num_bytes > free.free_bytes:
        raise ModelError(
            f"kv-cache-memory of {num_bytes / _GIB:.2f} GiB exceeds the {free.free_bytes / _GIB:.2f} GiB of memory "
            "that are free; give less, or leave it out to have it fitted"
        )


def _free_budget(spec: ModelSpec, layout: KvLayout, request: CacheRequest, wanted_len: int, free: FreeMemory) -> int:
    """Bytes that the pool may take of what is free."""
    share = _share(free)
    if request.step_bytes is not None:
        return max(0, share - request.step_bytes)
    # No sequence grows longer than a pool of all this memory.
    longest = layout.longest_sequence(share, 1, request.dtype.itemsize, wanted_len)
    return max(0, share - activation_bytes(spec, request, longest))


def _share(free: FreeMemory) -> int:
    """Bytes that pool and steps may take of what is free."""
    if free.device_type == "cuda":
        # What other processes hold is gone already; the fraction leaves room for fragmentation and libraries.
        return max(0, int(free.free_bytes - (1 - _CUDA_FRACTION) * free.total_bytes))
    return int(free.free_bytes * _CPU_FRACTION)


def activation_bytes(spec: ModelSpec, request: CacheRequest, max_model_len: int) -> int:
    """An upper estimate of what one step allocates beside weights and pool, and of the tables of RoPE."""
    num_layers = spec.num_hidden_layers
    widest = max(
        2 * spec.intermediate_size,
        (spec.num_attention_heads + 2 * spec.num_key_value_heads) * spec.head_dim,
    )
    if spec.experts is not None:
        # Each token is copied for each of its experts.
        widest = max(
            widest, 2 * spec.experts.num_experts_per_token * (spec.hidden_size + spec.experts.intermediate_size)
        )
    per_token = (4 * spec.hidden_size + 2 * widest) * request.dtype.itemsize
    # Sampling holds a few fp32 copies of the logits of every drawing row.
    per_row = 6 * 4 * spec.vocab_size
    return (
        request.max_num_batched_tokens * per_token
        + request.max_num_seqs * per_row
        + request.attention_bytes(max_model_len)
        + max_model_len * 4 * sum(rope.rotary_dim for rope in {spec.layer_rope(layer) for layer in range(num_layers)})
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed. torch says so of a CPU's memory by a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _OUT_OF_MEMORY_SIGNS)


def free_memory(device: torch.device) -> FreeMemory:
    """What this machine has to give now."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return FreeMemory("cuda", free, total)
    return FreeMemory("cpu", available_cpu_bytes(), psutil.virtual_memory().total)


def available_cpu_bytes() -> int:
    """Free memory of the machine, or what the control group leaves of it if that is less."""
    available: int = psutil.virtual_memory().available
    group = _cgroup_available()
    return available if group is None else min(available, group)


def _cgroup_available(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the container may still take; None where nothing limits it. Version 2 first, then version 1."""
    for limit_name, usage_name, stat_name in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        limit = _read_integer(root / limit_name)
        usage = _read_integer(root / usage_name)
        if limit is not None and usage is not None:
            # Page cache counts as usage, but the kernel drops it when asked to.
            return max(0, limit - usage + _inactive_file_bytes(root / stat_name))
    return None


def _read_integer(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max" says that there is no limit
        return None


def _inactive_file_bytes(path: Path) -> int:
    try:
        fields = dict(line.split(maxsplit=1) for line in path.read_text(encoding="ascii").splitlines())
        return int(fields.get("total_inactive_file", fields.get("inactive_file", "0")))
    except (OSError, ValueError):
        return 0
