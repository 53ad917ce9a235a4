"""Mixture of experts: products of tokens sorted by expert, in one launch for all experts (the fused MoE of vLLM and
SGLang, after MegaBlocks, Gale et al. 2022).

A pair is a token and one of the experts that it chose. Pairs are listed by expert, and each expert's are padded to
whole tiles, so that a tile of rows has one expert:

    expert     │     2     │           5           │ 6 │          experts without pairs have no tile
    tile       │     0     │     1     │     2     │ 3 │
    listed     │ 0 7 9 · · │ 1 2 4 6 8 │ 11 · · ·  │ …            ·: -1, no pair

    route      a program for each token: softmax, the largest few
    count      a program for each expert: how many pairs it has
    list       a program for each expert: its pairs, in order, and its tiles
    products   a program for each (tile of rows, tile of outputs); twice, with the gate between them
    sum        by token, in the order of its own choices

Nothing is read back by the host, so that a step can be captured; launches are as large as the worst case of so many
pairs, and programs behind the last tile end at once. Outputs are kept by pair, so no order but the token's own plays a
part in its sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import triton
import triton.language as tl

from ..backend import MoeSpec
from .elementwise import gated

_LISTED = 1024
"""Pairs that `count_kernel` and `list_kernel` read at a time."""
_SUM_TILE = 512


@dataclass(frozen=True, slots=True)
class DenseExperts:
    gate_up: torch.Tensor
    """Gate above up. [num_experts, 2 * inner, hidden]"""
    down: torch.Tensor
    """[num_experts, hidden, inner]"""


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """Of a program of the products. Not swept on a GPU."""

    rows: int
    outputs: int = 128
    inputs: int = 64
    num_warps: int = 4
    num_stages: int = 3


_FEW = ExpertsConfig(rows=16, num_stages=4)
_MANY = ExpertsConfig(rows=64)
_FP32_FEW = ExpertsConfig(rows=16, outputs=64, inputs=32)
_FP32_MANY = ExpertsConfig(rows=32, outputs=64, inputs=32)


def experts_config(num_pairs: int, num_experts: int, dtype: torch.dtype) -> ExpertsConfig:
    """Small tiles until experts have a tile's worth of tokens each, on average."""
    few, many = (_FP32_FEW, _FP32_MANY) if dtype is torch.float32 else (_FEW, _MANY)
    return few if num_pairs <= num_experts * few.rows else many


@triton.jit
def route_kernel(logits_ptr, weights_ptr, choices_ptr, logits_stride, EXPERTS: tl.constexpr, WIDTH: tl.constexpr,
                 CHOSEN: tl.constexpr, CHOSEN_PAD: tl.constexpr, RENORMALIZE: tl.constexpr):  # fmt: skip
    """The experts of one token and their weights, the likeliest first; of equal ones the first."""
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, WIDTH)
    real = experts < EXPERTS
    logits = tl.load(logits_ptr + token * logits_stride + experts, mask=real, other=float("-inf")).to(tl.float32)
    exponents = tl.exp(logits - tl.max(logits, axis=0))
    left = tl.where(real, exponents / tl.sum(exponents, axis=0), -2.0)
    places = tl.arange(0, CHOSEN_PAD)
    weights = tl.zeros([CHOSEN_PAD], tl.float32)
    choices = tl.zeros([CHOSEN_PAD], tl.int32)
    for place in tl.static_range(CHOSEN):
        best = tl.argmax(left, axis=0)
        # Of NaNs none is the largest: any expert will do, as long as there is one.
        best = tl.minimum(best, EXPERTS - 1)
        weight = tl.sum(tl.where(experts == best, left, 0.0), axis=0)
        weights = tl.where(places == place, weight, weights)
        choices = tl.where(places == place, best, choices)
        left = tl.where(experts == best, -1.0, left)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, axis=0)
    tl.store(weights_ptr + token * CHOSEN + places, weights, mask=places < CHOSEN)
    tl.store(choices_ptr + token * CHOSEN + places, choices, mask=places < CHOSEN)


@triton.jit(do_not_specialize=["num_pairs"])
def count_kernel(choices_ptr, counts_ptr, num_pairs, TILE: tl.constexpr):
    """How many pairs one expert has."""
    expert = tl.program_id(0)
    found = tl.zeros([TILE], tl.int32)
    for first in range(0, num_pairs, TILE):
        pairs = first + tl.arange(0, TILE)
        found += (tl.load(choices_ptr + pairs, mask=pairs < num_pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(found, axis=0))


@triton.jit(do_not_specialize=["num_pairs"])
def list_kernel(choices_ptr, counts_ptr, listed_ptr, tile_experts_ptr, num_tiles_ptr, num_pairs,
                EXPERTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """One expert's pairs and tiles, behind those of the experts before it."""
    expert = tl.program_id(0)
    experts = tl.arange(0, WIDTH)
    counts = tl.load(counts_ptr + experts, mask=experts < EXPERTS, other=0)
    first_tile = tl.sum(tl.where(experts < expert, tl.cdiv(counts, ROWS), 0), axis=0)
    num_tiles = tl.cdiv(tl.load(counts_ptr + expert), ROWS)
    if expert == EXPERTS - 1:
        tl.store(num_tiles_ptr, first_tile + num_tiles)
    for tile in range(num_tiles):
        tl.store(tile_experts_ptr + first_tile + tile, expert)
    start = first_tile * ROWS
    done = 0
    for first in range(0, num_pairs, TILE):
        pairs = first + tl.arange(0, TILE)
        mine = (tl.load(choices_ptr + pairs, mask=pairs < num_pairs, other=-1) == expert).to(tl.int32)
        places = start + done + tl.cumsum(mine, axis=0) - mine
        tl.store(listed_ptr + places, pairs, mask=mine > 0)
        done += tl.sum(mine, axis=0)
    rest = done + tl.arange(0, ROWS)
    tl.store(listed_ptr + start + rest, -1, mask=rest < num_tiles * ROWS)


@triton.jit
def experts_kernel(x_ptr, weights_ptr, out_ptr, listed_ptr, tile_experts_ptr, num_tiles_ptr, x_stride, expert_stride,
                   out_stride, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, PAIRS_PER_ROW: tl.constexpr,
                   ROW_TILE: tl.constexpr, OUTPUT_TILE: tl.constexpr, INPUT_TILE: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """out[pair] = weights[expert] . x[pair / PAIRS_PER_ROW] for one tile of pairs and one of outputs."""
    tile = tl.program_id(1)
    if tile >= tl.load(num_tiles_ptr):
        return
    expert = tl.load(tile_experts_ptr + tile).to(tl.int64)
    pairs = tl.load(listed_ptr + tile * ROW_TILE + tl.arange(0, ROW_TILE))
    exists = pairs >= 0
    rows = (tl.maximum(pairs, 0) // PAIRS_PER_ROW).to(tl.int64)
    outputs = tl.program_id(0) * OUTPUT_TILE + tl.arange(0, OUTPUT_TILE)
    real = outputs < OUTPUTS
    inner = tl.arange(0, INPUT_TILE)
    x_ptrs = x_ptr + rows[:, None] * x_stride + inner[None, :]  # [M, K]
    w_ptrs = weights_ptr + expert * expert_stride + outputs[None, :].to(tl.int64) * INPUTS + inner[:, None]  # [K, N]
    acc = tl.zeros([ROW_TILE, OUTPUT_TILE], tl.float32)
    for first in range(0, INPUTS, INPUT_TILE):
        within = inner < INPUTS - first
        x = tl.load(x_ptrs + first, mask=exists[:, None] & within[None, :], other=0.0)
        w = tl.load(w_ptrs + first, mask=real[None, :] & within[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    out_ptrs = out_ptr + pairs[:, None].to(tl.int64) * out_stride + outputs[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=exists[:, None] & real[None, :])


@triton.jit
def sum_kernel(parts_ptr, weights_ptr, out_ptr, HIDDEN: tl.constexpr, CHOSEN: tl.constexpr, TILE: tl.constexpr):
    """One tile of one token's weighted sum, in fp32."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = columns < HIDDEN
    total = tl.zeros([TILE], tl.float32)
    for place in tl.static_range(CHOSEN):
        pair = token * CHOSEN + place
        part = tl.load(parts_ptr + pair * HIDDEN + columns, mask=real, other=0.0).to(tl.float32)
        total += part * tl.load(weights_ptr + pair)
    tl.store(out_ptr + token * HIDDEN + columns, total.to(out_ptr.dtype.element_ty), mask=real)


@dataclass(frozen=True, slots=True)
class _Listing:
    """Pairs by expert, as the products read them."""

    pairs: torch.Tensor  # int32 [max tiles * rows], -1: none
    tile_experts: torch.Tensor  # int32 [max tiles]
    num_tiles: torch.Tensor  # int32 [1]


def route(router_logits: torch.Tensor, spec: MoeSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """router_logits [num_tokens, num_experts] → weights fp32 and experts int32, [num_tokens, chosen] each."""
    num_tokens, chosen = router_logits.shape[0], spec.num_experts_per_token
    weights = torch.empty((num_tokens, chosen), dtype=torch.float32, device=router_logits.device)
    choices = torch.empty((num_tokens, chosen), dtype=torch.int32, device=router_logits.device)
    route_kernel[(num_tokens,)](
        router_logits, weights, choices, router_logits.stride(0), EXPERTS=spec.num_experts,
        WIDTH=triton.next_power_of_2(spec.num_experts), CHOSEN=chosen, CHOSEN_PAD=triton.next_power_of_2(chosen),
        RENORMALIZE=spec.renormalize, num_warps=1)  # fmt: skip
    return weights, choices


def _list_pairs(choices: torch.Tensor, num_experts: int, rows: int) -> _Listing:
    num_pairs, device = choices.numel(), choices.device
    # Each expert that has any pair may leave all but one row of its last tile empty.
    max_tiles = (num_pairs + min(num_experts, num_pairs) * (rows - 1)) // rows
    counts = torch.empty(num_experts, dtype=torch.int32, device=device)
    listing = _Listing(
        torch.empty(max_tiles * rows, dtype=torch.int32, device=device),
        torch.empty(max_tiles, dtype=torch.int32, device=device),
        torch.empty(1, dtype=torch.int32, device=device),
    )
    count_kernel[(num_experts,)](choices, counts, num_pairs, TILE=_LISTED, num_warps=4)
    list_kernel[(num_experts,)](
        choices, counts, listing.pairs, listing.tile_experts, listing.num_tiles, num_pairs, EXPERTS=num_experts,
        WIDTH=triton.next_power_of_2(num_experts), ROWS=rows, TILE=_LISTED, num_warps=4)  # fmt: skip
    return listing


def _multiply(
    x: torch.Tensor, weights: torch.Tensor, listing: _Listing, num_pairs: int, pairs_per_row: int, config: ExpertsConfig
) -> torch.Tensor:
    """x [num_pairs / pairs_per_row, inputs], weights [num_experts, outputs, inputs] → [num_pairs, outputs]."""
    _, outputs, inputs = weights.shape
    out = torch.empty((num_pairs, outputs), dtype=x.dtype, device=x.device)
    experts_kernel[(triton.cdiv(outputs, config.outputs), listing.tile_experts.shape[0])](
        x, weights, out, listing.pairs, listing.tile_experts, listing.num_tiles, x.stride(0), weights.stride(0),
        out.stride(0), INPUTS=inputs, OUTPUTS=outputs, PAIRS_PER_ROW=pairs_per_row, ROW_TILE=config.rows,
        OUTPUT_TILE=config.outputs, INPUT_TILE=config.inputs,
        PRECISION="ieee" if x.dtype is torch.float32 else "tf32",
        num_warps=config.num_warps, num_stages=config.num_stages)  # fmt: skip
    return out


def moe(x: torch.Tensor, router_logits: torch.Tensor, experts: DenseExperts, spec: MoeSpec) -> torch.Tensor:
    """See `KernelBackend.moe`; x and the logits have contiguous rows."""
    num_tokens, hidden = x.shape
    chosen, num_pairs = spec.num_experts_per_token, num_tokens * spec.num_experts_per_token
    out = torch.empty_like(x)
    if not num_tokens:
        return out
    weights, choices = route(router_logits, spec)
    config = experts_config(num_pairs, spec.num_experts, x.dtype)
    listing = _list_pairs(choices, spec.num_experts, config.rows)
    inside = _multiply(x, experts.gate_up, listing, num_pairs, chosen, config)  # [num_pairs, 2 * inner]
    parts = _multiply(gated(inside, spec.activation), experts.down, listing, num_pairs, 1, config)
    tile = min(_SUM_TILE, triton.next_power_of_2(hidden))
    sum_kernel[(num_tokens, triton.cdiv(hidden, tile))](
        parts, weights, out, HIDDEN=hidden, CHOSEN=chosen, TILE=tile, num_warps=4
    )
    return out
