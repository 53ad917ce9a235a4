"""Drawing tokens on the device, without sorting the vocabulary.

A draw is the arg max of temperature-scaled logits plus Gumbel noise, over the tokens that min-p, top-k and top-p keep.
The noise is a hash of (seed, position, token) and equals model/random.py bit by bit up to the last logarithms. What is
kept is everything at or above one value, which a search over the bit patterns of floats finds: sixteen pivots are
counted in each pass over a row, so eight passes pin down all 32 bits (in the spirit of FlashInfer's sorting-free
sampling). Tokens of equal logits stay or go together.
"""

from __future__ import annotations

import torch

import triton
import triton.language as tl

from ..backend import DrawParameters

_DRAW_TILE = 4096
_SEARCH_TILE = 2048


@triton.jit
def _splitmix64(value):
    """One output of SplitMix64 (Steele, Lea and Flood 2014), uint64."""
    value = value + 0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)


@triton.jit
def _log1p(x):
    """log(1 + x), exact to rounding for small x too (Kahan): the rounding of 1 + x cancels."""
    w = 1.0 + x
    return tl.where(w == 1.0, x, tl.log(w) * (x / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def _gumbel(key, tokens):
    """Standard Gumbel noise of `tokens` [N] under a row's 64-bit key, as model/random.py computes it."""
    x = tokens.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    x = (x ^ key.to(tl.uint32)) * 0x7FEB352D
    x = x ^ (x >> 16)
    x = (x ^ (key >> 32).to(tl.uint32)) * 0x846CA68B
    x = x ^ (x >> 16)
    bits = (x & 0x7FFFFFFF).to(tl.float32)
    # The last factor keeps 1 - u above 0 where the bits round up to 2**31.
    return -tl.log(-_log1p((bits + 0.5) * (-4.656612873077393e-10 * (1.0 - 5.960464477539063e-08))))


# Parameters may be parts of larger tensors, whose lengths follow the batch: wherever they begin, kernels are the same.
@triton.jit(do_not_specialize_on_alignment=["temperatures_ptr", "thresholds_ptr", "seeds_ptr", "positions_ptr"])
def draw_kernel(logits_ptr, temperatures_ptr, thresholds_ptr, seeds_ptr, positions_ptr, best_ptr, best_ids_ptr,
                logits_stride, vocab_size, TILE: tl.constexpr):  # fmt: skip
    """The best token of one tile of one row: its score, and its id or -1 where the tile holds a NaN."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    tokens = tile * TILE + tl.arange(0, TILE)
    real = tokens < vocab_size
    logits = tl.load(logits_ptr + row * logits_stride + tokens, mask=real, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures_ptr + row)
    scores = logits
    if temperature > 0.0:
        scaled = logits / temperature
        position = tl.load(positions_ptr + row).to(tl.uint64)
        seed = tl.load(seeds_ptr + row).to(tl.uint64, bitcast=True)
        key = _splitmix64(_splitmix64(seed) ^ position)
        scores = scaled + _gumbel(key, tokens)
        scores = tl.where(scaled >= tl.load(thresholds_ptr + row), scores, float("-inf"))
    scores = tl.where(real, scores, float("-inf"))
    num_nan = tl.sum((logits != logits).to(tl.int32), axis=0)
    best = tl.max(scores, axis=0)
    # The lowest of equals, and never an id beyond the vocabulary.
    best_id = tl.min(tl.where(scores == best, tokens, vocab_size - 1), axis=0)
    place = row * tl.num_programs(1) + tile
    tl.store(best_ptr + place, best)
    tl.store(best_ids_ptr + place, tl.where(num_nan > 0, -1, best_id))


@triton.jit
def pick_kernel(best_ptr, best_ids_ptr, ids_ptr, num_tiles, TILES: tl.constexpr):
    """Join the tiles of one row; the first of equals wins, and a -1 anywhere wins over all."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, TILES)
    real = tiles < num_tiles
    best = tl.load(best_ptr + row * num_tiles + tiles, mask=real, other=float("-inf"))
    ids = tl.load(best_ids_ptr + row * num_tiles + tiles, mask=real, other=0)
    spoilt = tl.min(ids, axis=0) < 0
    first = tl.min(tl.where((best == tl.max(best, axis=0)) & real, tiles, TILES), axis=0)
    chosen = tl.sum(tl.where(tiles == first, ids, 0), axis=0)
    tl.store(ids_ptr + row, tl.where(spoilt, -1, chosen).to(tl.int64))


@triton.jit
def _ordered(x):
    """fp32 → uint32 in the same order."""
    bits = x.to(tl.uint32, bitcast=True)
    return bits ^ ((bits >> 31) * 0x7FFFFFFF | 0x80000000)


@triton.jit
def _from_ordered(key):
    """The inverse of `_ordered`."""
    bits = key ^ ((1 - (key >> 31)) * 0x7FFFFFFF | 0x80000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _scaled(logits_ptr, start, temperature, vocab_size, TILE: tl.constexpr):
    """A tile of a row's logits over the temperature, as the draw computes them, and which of them exist."""
    tokens = start + tl.arange(0, TILE)
    real = tokens < vocab_size
    return tl.load(logits_ptr + tokens, mask=real, other=float("-inf")).to(tl.float32) / temperature, real


@triton.jit
def _search(logits_ptr, temperature, maximum, lowest, limit, vocab_size, MASS: tl.constexpr, TILE: tl.constexpr):
    """The least ordered value from `lowest` on above which there is less than `limit` (above 0): tokens, or with MASS
    weight.

    Weight is exp(scaled logit - maximum). Tiles are added up in order, so the result depends on the row alone. Threads
    keep sums of their own and meet once a pass: to meet in every tile would take longer than to read it.
    """
    low = lowest  # uint32; the answer is one of the 16 * step values from here on
    step = tl.full([], 1 << 28, tl.uint32)
    pivots = tl.arange(0, 16).to(tl.uint32)
    for _ in range(8):
        bounds = low + pivots * step  # [16]
        # What wrapped around lies behind all values.
        bounds = tl.where(bounds < low, 0xFFFFFFFF, bounds)
        sums = tl.zeros([16, TILE], tl.float32)
        # Named here, stages make loads run ahead that feed no matrix product.
        for start in tl.range(0, vocab_size, TILE, num_stages=4):
            scaled, real = _scaled(logits_ptr, start, temperature, vocab_size, TILE)
            keys = _ordered(scaled)
            counted = real & (keys >= lowest)
            if MASS:
                weight = tl.where(counted, tl.exp(scaled - maximum), 0.0)
            else:
                weight = tl.where(counted, 1.0, 0.0)
            sums += tl.where(keys[None, :] > bounds[:, None], weight[None, :], 0.0)
        above = tl.sum(sums, axis=1)
        # What is above falls as the bound rises, so the answer lies behind the last bound that has too much above it.
        num_exceeded = tl.sum((above >= limit).to(tl.uint32), axis=0)
        low = tl.where(num_exceeded > 0, low + (num_exceeded - 1) * step + 1, low)
        step = step // 16
    return low


@triton.jit(
    do_not_specialize_on_alignment=["temperatures_ptr", "top_ks_ptr", "top_ps_ptr", "min_ps_ptr", "thresholds_ptr"]
)
def threshold_kernel(logits_ptr, temperatures_ptr, top_ks_ptr, top_ps_ptr, min_ps_ptr, thresholds_ptr, logits_stride,
                     vocab_size, TILE: tl.constexpr):  # fmt: skip
    """The least temperature-scaled logit that one row keeps: min-p, then top-k, then top-p of what these two keep."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures_ptr + row)
    top_k = tl.load(top_ks_ptr + row)
    top_p = tl.load(top_ps_ptr + row)
    min_p = tl.load(min_ps_ptr + row)
    whole = (top_k <= 0) | (top_k >= vocab_size)
    if (temperature <= 0.0) | (whole & (top_p >= 1.0) & (min_p <= 0.0)):
        tl.store(thresholds_ptr + row, float("-inf"))
        return
    logits_ptr += row * logits_stride
    maxima = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, vocab_size, TILE):
        scaled, _ = _scaled(logits_ptr, start, temperature, vocab_size, TILE)
        maxima = tl.maximum(maxima, scaled)
    maximum = tl.max(maxima, axis=0)
    lowest = _ordered(maximum + tl.log(min_p)) if min_p > 0.0 else tl.full([], 0, tl.uint32)
    if not whole:
        lowest = _search(logits_ptr, temperature, maximum, lowest, top_k.to(tl.float32), vocab_size, False, TILE)
    if top_p < 1.0:
        sums = tl.zeros([TILE], tl.float32)
        for start in range(0, vocab_size, TILE):
            scaled, real = _scaled(logits_ptr, start, temperature, vocab_size, TILE)
            counted = real & (_ordered(scaled) >= lowest)
            sums += tl.where(counted, tl.exp(scaled - maximum), 0.0)
        mass = tl.sum(sums, axis=0)
        lowest = _search(logits_ptr, temperature, maximum, lowest, top_p * mass, vocab_size, True, TILE)
    tl.store(thresholds_ptr + row, tl.minimum(_from_ordered(lowest), maximum))


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "repetitions_ptr", "frequencies_ptr", "presences_ptr"])
def penalise_kernel(logits_ptr, out_ptr, slots_ptr, counts_ptr, in_prompt_ptr, repetitions_ptr, frequencies_ptr,
                    presences_ptr, logits_stride, vocab_size, TILE: tl.constexpr):  # fmt: skip
    """One tile of one row in fp32, penalised by the counts in the row's slot; a slot below 0 has none.

    Repetition looks at prompt and output, frequency and presence at the output alone, as in vLLM.
    """
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * TILE + tl.arange(0, TILE)
    real = tokens < vocab_size
    x = tl.load(logits_ptr + row * logits_stride + tokens, mask=real, other=0.0).to(tl.float32)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot >= 0:
        count = tl.load(counts_ptr + slot * vocab_size + tokens, mask=real, other=0)
        in_prompt = tl.load(in_prompt_ptr + slot * vocab_size + tokens, mask=real, other=0)
        repetition = tl.load(repetitions_ptr + row)
        seen = (count > 0) | (in_prompt != 0)
        x = tl.where(seen, tl.where(x > 0, x / repetition, x * repetition), x)
        x -= count.to(tl.float32) * tl.load(frequencies_ptr + row)
        x -= tl.where(count > 0, tl.load(presences_ptr + row), 0.0)
    tl.store(out_ptr + row * vocab_size + tokens, x, mask=real)


def draw(logits: torch.Tensor, parameters: DrawParameters, positions: torch.Tensor, *, truncated: bool) -> torch.Tensor:
    """logits [num_rows, vocab] in any float dtype, after penalties → token ids int64 [num_rows], -1 where one is NaN.

    positions int64 [num_rows]: of the tokens to draw.
    `truncated`: whether any row may use top-k, top-p or min-p; without, the search is not launched. Never synchronises.
    """
    num_rows, vocab_size = logits.shape
    num_tiles = triton.cdiv(vocab_size, _DRAW_TILE)
    device = logits.device
    thresholds = torch.full((num_rows,), float("-inf"), dtype=torch.float32, device=device)
    if truncated:
        threshold_kernel[(num_rows,)](
            logits, parameters.temperatures, parameters.top_ks, parameters.top_ps, parameters.min_ps, thresholds,
            logits.stride(0), vocab_size, TILE=_SEARCH_TILE, num_warps=16)  # fmt: skip
    best = torch.empty((num_rows, num_tiles), dtype=torch.float32, device=device)
    best_ids = torch.empty((num_rows, num_tiles), dtype=torch.int32, device=device)
    ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    draw_kernel[(num_rows, num_tiles)](
        logits, parameters.temperatures, thresholds, parameters.seeds, positions, best, best_ids,
        logits.stride(0), vocab_size, TILE=_DRAW_TILE, num_warps=8)  # fmt: skip
    pick_kernel[(num_rows,)](best, best_ids, ids, num_tiles, TILES=triton.next_power_of_2(num_tiles), num_warps=1)
    return ids


def penalise(
    logits: torch.Tensor,
    slots: torch.Tensor,
    counts: torch.Tensor,
    in_prompt: torch.Tensor,
    penalties: torch.Tensor,
) -> torch.Tensor:
    """logits [num_rows, vocab] → fp32 of the same shape, penalised.

    slots int32 [num_rows], -1 for a row without penalties; counts int32 and in_prompt bool [num_slots, vocab];
    penalties fp32 [3, num_rows]: repetition, frequency, presence.
    """
    num_rows, vocab_size = logits.shape
    out = torch.empty((num_rows, vocab_size), dtype=torch.float32, device=logits.device)
    penalise_kernel[(num_rows, triton.cdiv(vocab_size, _DRAW_TILE))](
        logits, out, slots, counts, in_prompt, penalties[0], penalties[1], penalties[2], logits.stride(0), vocab_size,
        TILE=_DRAW_TILE, num_warps=8)  # fmt: skip
    return out
