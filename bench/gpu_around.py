"""The kernels around attention on random inputs, for bench/gpu.py: norms, activations, rotation, drawing, penalties."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from gpu_measure import ERROR_LIMITS, Setting, relative_error
from gpu_trial import Case, Trial, dtypes, randn
from octavo.kernels.backend import AttentionSpec, DrawParameters
from octavo.kernels.triton.elementwise import add_rms_norm, gated, rms_norm
from octavo.kernels.triton.rope import rope_write
from octavo.kernels.triton.sampling import draw, penalise
from octavo.model.random import GumbelNoise
from octavo.model.truncation import Truncation, draw_truncated
from octavo.scheduler.sampling_params import SamplingParams

_DRAW_LIMIT = 0.01
"""Rows whose draw may fall otherwise: at the edge of top-p, sums in another order decide."""

# ---- Norms, activations, rotation ------------------------------------------------------------------------------------


def row_cases(setting: Setting) -> Iterator[Case]:
    """Norms and gated activations, of a large batch of Llama-3.1-8B."""
    rows, hidden, inner = (3, 48, 96) if setting.dry else (256, 4096, 14336)
    for dtype, _ in dtypes(setting):
        label = f"{rows} × {{}} {str(dtype).removeprefix('torch.')}"
        yield Case("rms_norm " + label.format(hidden), _norm(rows, hidden, dtype, False), ERROR_LIMITS[dtype])
        yield Case("add_rms_norm " + label.format(hidden), _norm(rows, hidden, dtype, True), ERROR_LIMITS[dtype])
        for activation in ("silu", "gelu_tanh", "gelu"):
            yield Case(
                f"{activation} " + label.format(inner), _gate(rows, inner, dtype, activation), ERROR_LIMITS[dtype]
            )


def _norm(rows: int, hidden: int, dtype: torch.dtype, add: bool) -> Callable[[torch.Generator], Trial]:
    def make(generator: torch.Generator) -> Trial:
        x, residual, weight = (randn(size, dtype, generator) for size in ((rows, hidden), (rows, hidden), (hidden,)))
        total = x.double() + residual.double() if add else x.double()
        found: list[torch.Tensor] = []

        def launch() -> None:
            found[:] = [add_rms_norm(x, residual, weight, 1e-5) if add else rms_norm(x, weight, 1e-5)]

        def error() -> float:
            expected = F.rms_norm(total, (hidden,), weight.double(), 1e-5)
            return max(relative_error(found[0], expected), relative_error(residual, total) if add else 0.0)

        return Trial(launch, error, (4 if add else 2) * x.nbytes)

    return make


def _gate(rows: int, inner: int, dtype: torch.dtype, activation: str) -> Callable[[torch.Generator], Trial]:
    def make(generator: torch.Generator) -> Trial:
        both = randn((rows, 2 * inner), dtype, generator) * 2
        found: list[torch.Tensor] = []

        def launch() -> None:
            found[:] = [gated(both, activation)]

        def error() -> float:
            gate, up = both.double().chunk(2, dim=-1)
            approximate = "tanh" if activation == "gelu_tanh" else "none"
            active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate=approximate)
            return relative_error(found[0], active * up)

        return Trial(launch, error, both.nbytes * 3 // 2)

    return make


def rope_cases(setting: Setting) -> Iterator[Case]:
    shapes = [(4, 2, 16, 16), (2, 1, 16, 8)] if setting.dry else [(32, 8, 128, 128), (32, 8, 64, 64), (32, 32, 80, 32)]
    rows = 5 if setting.dry else 256
    for dtype, count in dtypes(setting):
        for heads, kv_heads, head_dim, rotary in shapes[: count and 1]:
            for norm in (False, True):
                label = f"{rows} × {heads}+{kv_heads}×{head_dim}, {rotary} rotated{', qk norm' if norm else ''}"
                make = _rope(rows, AttentionSpec(heads, kv_heads, head_dim, 1.0), rotary, dtype, norm)
                yield Case(f"rope_write {label} {str(dtype).removeprefix('torch.')}", make, ERROR_LIMITS[dtype])


def _rope(
    rows: int, spec: AttentionSpec, rotary: int, dtype: torch.dtype, norm: bool
) -> Callable[[torch.Generator], Trial]:
    block, heads = 16, spec.num_heads + 2 * spec.num_kv_heads

    def make(generator: torch.Generator) -> Trial:
        device = generator.device
        qkv = randn((rows, heads * spec.head_dim), dtype, generator)
        before = qkv.double().view(rows, heads, spec.head_dim)
        table = randn((4096, rotary), torch.float32, generator)
        positions = torch.randint(0, 4096, (rows,), generator=generator, device=device)
        num_blocks = -(-2 * rows // block)
        slots = torch.randperm(num_blocks * block, generator=generator, device=device)[:rows]
        slots[rows // 2] = -1  # a padded row: nothing of it is read or written
        weights = randn((2, spec.head_dim), dtype, generator)
        shape = (num_blocks, 2, spec.num_kv_heads, block, spec.head_dim)
        layer = torch.full(shape, math.nan, dtype=dtype, device=device)
        norms = (weights[0], weights[1], 1e-5) if norm else None

        def error() -> float:
            real = (slots >= 0).nonzero().view(-1)
            expected = _rotated(before, spec, table, positions, weights if norm else None)[real]
            at = slots[real]
            kv = layer[at // block, :, :, at % block].flatten(1, 2)  # [n, 2 * num_kv_heads, head_dim]
            found = torch.cat((qkv.view(rows, heads, -1)[real, : spec.num_heads], kv), dim=1)
            untouched = int(layer.isnan().sum()) == layer.numel() - kv.numel()
            same = torch.equal(qkv.view(rows, heads, -1)[rows // 2].double(), before[rows // 2])
            return relative_error(found, expected) if untouched and same else math.inf

        num_bytes = qkv.nbytes + qkv.nbytes * (spec.num_heads + 2 * spec.num_kv_heads) // heads
        return Trial(lambda: rope_write(qkv, table, positions, slots, layer, spec, norms), error, num_bytes)

    return make


def _rotated(
    x: torch.Tensor, spec: AttentionSpec, table: torch.Tensor, positions: torch.Tensor, norms: torch.Tensor | None
) -> torch.Tensor:
    """x fp64 [num_tokens, q, k and v heads, head_dim] → the same, q and k normed if `norms`, and rotated."""
    num_rotated, rotary = spec.num_heads + spec.num_kv_heads, table.shape[1]
    values = x[:, num_rotated:]
    x = x[:, :num_rotated]
    if norms is not None:
        q, k = x[:, : spec.num_heads], x[:, spec.num_heads :]
        q, k = (F.rms_norm(part, part.shape[-1:], w.double(), 1e-5) for part, w in zip((q, k), norms, strict=True))
        x = torch.cat((q, k), dim=1)
    cosine, sine = table.double()[positions][:, None].chunk(2, dim=-1)
    low, high = x[..., : rotary // 2], x[..., rotary // 2 : rotary]
    x = torch.cat((low * cosine - high * sine, high * cosine + low * sine, x[..., rotary:]), dim=-1)
    return torch.cat((x, values), dim=1)


# ---- Sampling --------------------------------------------------------------------------------------------------------


def sampling_cases(setting: Setting) -> Iterator[Case]:
    rows, vocab = (2, 300) if setting.dry else (256, 128256)
    kinds = {
        "greedy": SamplingParams(temperature=0.0),
        "temperature": SamplingParams(temperature=0.9),
        "top-k 50": SamplingParams(temperature=0.9, top_k=50),
        "top-p 0.95": SamplingParams(temperature=0.9, top_p=0.95),
        "min-p, top-k, top-p": SamplingParams(temperature=1.2, top_k=400, top_p=0.8, min_p=0.001),
    }
    for name, params in kinds.items():
        if setting.dry and name in ("top-k 50", "top-p 0.95"):
            continue  # the last kind does all that they do
        # Tokens of equal logits stay or go together here, and not where the reference sorts: no ties, hence fp32.
        truncated = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        dtype = torch.float32 if truncated or setting.dry else torch.bfloat16
        yield Case(f"draw {rows} × {vocab}, {name}", _draw(rows, vocab, dtype, params), _DRAW_LIMIT)
    dtype = torch.float32 if setting.dry else torch.bfloat16
    yield Case(f"penalise {rows} × {vocab}", _penalise(rows, vocab, dtype), ERROR_LIMITS[torch.float32])


def _draw(rows: int, vocab: int, dtype: torch.dtype, params: SamplingParams) -> Callable[[torch.Generator], Trial]:
    def make(generator: torch.Generator) -> Trial:
        device = generator.device
        logits = (torch.randn((rows, vocab), device=device, generator=generator) * 3).to(dtype)
        seeds = torch.randint(-(2**62), 2**62, (rows,), device=device, generator=generator)
        positions = torch.randint(0, 10**5, (rows,), device=device, generator=generator)

        def column(value: float, kind: torch.dtype) -> torch.Tensor:
            return torch.full((rows,), value, dtype=kind, device=device)

        parameters = DrawParameters(
            temperatures=column(params.temperature, torch.float32),
            top_ks=column(params.top_k, torch.int32),
            top_ps=column(params.top_p, torch.float32),
            min_ps=column(params.min_p, torch.float32),
            seeds=seeds,
        )
        found: list[torch.Tensor] = []

        def launch() -> None:
            found[:] = [draw(logits, parameters, positions, truncated=True)]

        def error() -> float:
            expected = _drawn(logits.float(), params, seeds.tolist(), positions.tolist())
            return float((found[0] != expected).double().mean())

        return Trial(launch, error, logits.nbytes)

    return make


def _drawn(logits: torch.Tensor, params: SamplingParams, seeds: list[int], positions: list[int]) -> torch.Tensor:
    """What the model room's sampler draws from fp32 logits; int64 [num_rows]."""
    if params.greedy:
        return _first_best(logits)
    noise = GumbelNoise(logits.shape[1], logits.device)
    keys, scaled = noise.row_keys(seeds, positions), logits / params.temperature
    if params.top_k > 0 or params.top_p < 1 or params.min_p > 0:
        truncation = Truncation.of([params] * len(seeds), logits.shape[1], logits.device)
        return draw_truncated(scaled, truncation, noise, keys)
    return _first_best(scaled + noise.all_tokens(keys))


def _first_best(scores: torch.Tensor) -> torch.Tensor:
    """The lowest of the best, which torch's own does not promise. [n, vocab] → int64 [n]"""
    vocab = scores.shape[1]
    tokens = torch.arange(vocab, device=scores.device)
    return torch.where(scores == scores.amax(dim=-1, keepdim=True), tokens, vocab).amin(dim=-1)


def _penalise(rows: int, vocab: int, dtype: torch.dtype) -> Callable[[torch.Generator], Trial]:
    def make(generator: torch.Generator) -> Trial:
        device, num_slots = generator.device, rows + 2
        logits = randn((rows, vocab), dtype, generator)
        slots = torch.randperm(num_slots, device=device, generator=generator)[:rows].to(torch.int32)
        slots[0] = -1
        counts = torch.randint(0, 3, (num_slots, vocab), device=device, generator=generator, dtype=torch.int32)
        in_prompt = torch.randint(0, 2, (num_slots, vocab), device=device, generator=generator).bool()
        penalties = torch.rand((3, rows), device=device, generator=generator) + 0.5
        found: list[torch.Tensor] = []

        def launch() -> None:
            found[:] = [penalise(logits, slots, counts, in_prompt, penalties)]

        def error() -> float:
            repetition, frequency, presence = penalties.double()[:, :, None]
            count = counts[slots.clamp(min=0).long()]
            x = logits.double()
            seen = (count > 0) | in_prompt[slots.clamp(min=0).long()]
            x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
            x = x - count * frequency - (count > 0) * presence
            x[0] = logits[0].double()  # slot -1: no penalties
            return relative_error(found[0], x)

        # logits, counts and flags are read, fp32 is written
        return Trial(launch, error, rows * vocab * (dtype.itemsize + 4 + 1 + 4))

    return make
