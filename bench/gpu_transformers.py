"""The engine's work done by transformers' continuous batching, in the same process, for bench/gpu.py.

Its model has random weights of its own. What is compared is the rate of tokens while every request decodes: from the
last request's first token to the first request's last, by the times that transformers notes for each token.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from gpu_engine import Load, case_name, loads, models, steps
from gpu_measure import Row, Setting, State, attempt
from octavo.model.spec import ModelSpec

_FEWEST_TOKENS = 8
"""In the common stretch, per request; a shorter one says nothing."""


def run(state: State) -> Iterator[Row]:
    if importlib.util.find_spec("transformers") is None:
        yield Row("transformers", "continuous batching", notes=["skipped: transformers is not installed"])
        return
    setting = state.setting
    for name, spec in models(setting).items():
        held: list[Any] = []
        row = attempt(Row("transformers", f"{name}, load"), lambda _, s=spec, h=held: h.append(_model(s, setting)))  # type: ignore[misc]
        # A rival that does not run is no failure of ours.
        if row.failure is not None:
            yield _excused(row)
            continue
        yield from _cases(name, held.pop(), state)
        setting.free_bytes()


def _cases(name: str, model: Any, state: State) -> Iterator[Row]:
    setting = state.setting
    seconds_per_token = 0.0  # of context and output, as the case before had it
    for load in (load for load in loads(setting) if load.params == "greedy"):
        row = Row("transformers", case_name(name, load), unit="tok/s")
        work = load.batch * (load.context + _num_tokens(load, setting))
        if state.clock.left < seconds_per_token * work:
            row.notes.append("skipped: out of time")
            yield row
            continue
        started = time.perf_counter()
        yield _excused(attempt(row, lambda row, one=load: _measure(row, model, one, state)))  # type: ignore[misc]
        seconds_per_token = (time.perf_counter() - started) / work
        gc.collect()


def _excused(row: Row) -> Row:
    if row.failure is not None:
        row.notes.append(row.failure)
        row.failure = None
    return row


def _num_tokens(load: Load, setting: Setting) -> int:
    """That each request generates; some while others are still being prefilled."""
    return 6 if setting.dry else steps(setting).tokens(load)


def _model(spec: ModelSpec, setting: Setting) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging as library_logging

    library_logging.set_verbosity_error()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_hidden_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_position_embeddings,
        tie_word_embeddings=spec.tie_word_embeddings,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if setting.dry else torch.bfloat16)
    try:
        with torch.device(setting.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _measure(row: Row, model: Any, load: Load, state: State) -> None:
    from transformers import GenerationConfig

    setting = state.setting
    generator = random.Random(setting.seed)
    prompts = [[generator.randrange(model.config.vocab_size) for _ in range(load.context)] for _ in range(load.batch)]
    count = _num_tokens(load, setting)
    wanted = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
    started = time.perf_counter()
    results = model.generate_batch(prompts, generation_config=wanted, record_timestamps=True, progress_bar=False)
    total = time.perf_counter() - started
    times = [list(result.timestamps or ()) for result in results.values()]
    row.values |= {"total_s": total, "attention": model.config._attn_implementation}
    if len(times) != load.batch or any(len(stamps) < count - 1 for stamps in times):
        raise RuntimeError(f"{sum(map(len, times))} tokens of {load.batch * count} came out")
    _rate(row, times)
    _compare(row, state)


def _rate(row: Row, times: Sequence[Sequence[float]]) -> None:
    start, end = max(stamps[0] for stamps in times), min(stamps[-1] for stamps in times)
    tokens = sum(start < stamp <= end for stamps in times for stamp in stamps)
    if end <= start or tokens < min(_FEWEST_TOKENS, len(times[0]) - 2) * len(times):
        row.notes.append("the requests hardly ever decoded all at once: no steady rate")
        return
    row.rate = tokens / (end - start)
    row.seconds = len(times) / row.rate
    row.values["tokens_per_s"] = row.rate


def _compare(row: Row, state: State) -> None:
    ours = next((r.rate for r in state.rows if r.section == "engine" and r.case == row.case), None)
    if ours is not None and row.rate:
        row.values["octavo_over_transformers"] = ours / row.rate
        row.notes.append(f"Octavo {ours:,.0f} tok/s ({ours / row.rate:.2f}×)")
