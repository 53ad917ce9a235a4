"""The measurement of `octavo bench kv-cache`: prompts, repeats, and the comparison of tokens."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .kv_cache import PromptResult, Run
from .kv_cache_engine import BenchEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    prompt_lengths: Sequence[int]
    num_output: int
    num_repeats: int
    seed: int
    """Of the prompts, which are random token ids: their meaning changes no cost."""


def measure(engine: BenchEngine, settings: Settings, note: Callable[[str], None]) -> list[PromptResult]:
    """Repeats go round all prompt lengths and both ways, so that a machine that slows down does so for both.
    `note` gets a line whenever something is done. Raises GenerationFailed, UncountedWork."""
    rng = random.Random(settings.seed)
    vocab_size = engine.ready.vocab_size
    prompts = {length: [rng.randrange(vocab_size) for _ in range(length)] for length in settings.prompt_lengths}
    runs: dict[int, tuple[list[Run], list[Run]]] = {length: ([], []) for length in prompts}
    warm_up(engine, settings)
    for repeat in range(settings.num_repeats):
        for length, prompt in prompts.items():
            cached, recomputed = runs[length]
            started = time.perf_counter()
            cached.append(engine.generate_cached(prompt, settings.num_output))
            between = time.perf_counter()
            recomputed.append(engine.generate_recomputed(prompt, cached[0].token_ids))
            note(
                f"{length} tokens of prompt, repeat {repeat + 1} of {settings.num_repeats}: "
                f"{between - started:.2f} s with the cache, {time.perf_counter() - between:.2f} s without"
            )
    results = []
    for length, prompt in prompts.items():
        cached, recomputed = runs[length]
        partings = engine.explain(prompt, cached[0].token_ids, differing(cached, recomputed))
        results.append(PromptResult(length, cached, recomputed, partings))
    return results


def warm_up(engine: BenchEngine, settings: Settings) -> None:
    """The longest context and a few decodes, untimed: they touch all memory, and choose the code for their sizes."""
    longest = max(settings.prompt_lengths) + settings.num_output - 1
    engine.generate_recomputed([0] * longest, [0])
    for length in settings.prompt_lengths:
        engine.generate_cached([0] * length, min(3, settings.num_output))


def differing(cached: Sequence[Run], recomputed: Sequence[Run]) -> dict[int, int]:
    """Where any run drew another token than the first cached one did: index → that token. A cached run goes its own way
    after its first difference, so it counts up to there; recomputing continues the first run's tokens throughout."""
    reference = cached[0].token_ids
    found: dict[int, int] = {}
    for run in cached:
        for index, token_id in _differences(run.token_ids, reference)[:1]:
            found.setdefault(index, token_id)
    for run in recomputed:
        for index, token_id in _differences(run.token_ids, reference):
            found.setdefault(index, token_id)
    return found


def _differences(token_ids: Sequence[int], reference: Sequence[int]) -> list[tuple[int, int]]:
    pairs = enumerate(zip(token_ids, reference, strict=True))
    return [(index, token_id) for index, (token_id, expected) in pairs if token_id != expected]
