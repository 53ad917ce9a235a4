"""`octavo bench kv-cache` for people (a table and small plots) and for programs (JSON)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..engine.messages import EngineReady
from .kv_cache import (
    CostFit,
    PromptResult,
    Run,
    cached_work,
    fit_results,
    growth,
    median_curve,
    median_total,
    recompute_work,
)
from .plot_text import bar, line_chart

_BAR_WIDTH = 48
_CHART_WIDTH, _CHART_HEIGHT = 60, 8
_CLEAR_R_SQUARED = 0.5
"""Below it most of the variation is not the context's doing, and nothing should be concluded from the slope."""


def print_report(console: Console, results: Sequence[PromptResult], num_layers: int) -> None:
    console.print(_table(results, num_layers))
    _print_tokens(console, results)
    _print_bars(console, results)
    _print_curve(console, results[-1])
    _print_fits(console, results)


def as_json(results: Sequence[PromptResult], ready: EngineReady, num_layers: int) -> dict[str, Any]:
    """Everything measured, every repeat's total and the median time of every token."""
    with_cache, without = fit_results(results)
    return {
        "engine": {
            "architecture": ready.architecture,
            "dtype": ready.dtype,
            "device": ready.device,
            "backend": ready.backend,
            "num_layers": num_layers,
            "weight_bytes": ready.weight_bytes,
            "max_num_batched_tokens": ready.max_num_batched_tokens,
            "block_size": ready.block_size,
        },
        "prompts": [_prompt_json(result, num_layers) for result in results],
        "seconds_per_token_by_context": {"with_cache": _fit_json(with_cache), "without_cache": _fit_json(without)},
    }


def _table(results: Sequence[PromptResult], num_layers: int) -> Table:
    table = Table(
        title=f"{results[0].num_output} tokens after a prompt, with the K/V cache and without", title_style=""
    )
    for heading in (
        *("prompt", "cache", "seconds", "tok/s", "ratio", "first\ntoken ms", "further tokens\nms, start → end"),
        *("K/V computed\ntokens × layers", "K/V reused\ntokens × layers"),
    ):
        table.add_column(heading, justify="left" if heading == "cache" else "right")
    for result in results:
        for name, runs, ratio in (("with", result.cached, f"{result.ratio:.1f}×"), ("without", result.recomputed, "")):
            work, curve = runs[0].work, median_curve(runs)
            quarters = growth(curve)
            table.add_row(
                f"{result.num_prompt}" if ratio else "",
                name,
                f"{median_total(runs):.2f}",
                f"{result.num_output / median_total(runs):.1f}",
                ratio,
                f"{1e3 * curve[0]:.0f}",
                f"{1e3 * quarters.first_quarter_seconds:.1f} → {1e3 * quarters.last_quarter_seconds:.1f}",
                f"{work.num_computed * num_layers:,}",
                f"{work.num_reused * num_layers:,}",
                end_section=not ratio,
            )
    return table


def _print_tokens(console: Console, results: Sequence[PromptResult]) -> None:
    """Whether both ways gave the same tokens, and every place where they did not."""
    for result in results:
        console.print(f"prompt {result.num_prompt}: {result.num_agreeing} of {result.num_output} tokens are equal")
        for parting in result.partings:
            gap = "further apart than the listed ones" if parting.gap is None else f"{parting.gap:.4f} apart"
            verdict = "closer than the dtype's rounding" if parting.near_tie else "MORE THAN ROUNDING"
            console.print(
                f"  parted at token {parting.index}: {parting.cached_token} with the cache, {parting.recomputed_token} "
                f"without, {gap} in log probability: {verdict}"
            )


def _print_bars(console: Console, results: Sequence[PromptResult]) -> None:
    longest = max(median_total(runs) for result in results for runs in (result.cached, result.recomputed))
    console.print(f"\nseconds for {results[0].num_output} tokens")
    for result in results:
        for name, runs in (("with   ", result.cached), ("without", result.recomputed)):
            total = median_total(runs)
            label = f"{result.num_prompt:>6} " if runs is result.cached else " " * 7
            console.print(f"{label}{name} {bar(total, longest, _BAR_WIDTH)} {total:.2f}")


def _print_curve(console: Console, result: PromptResult) -> None:
    """Cumulative seconds of both ways; the lower line is the one with the cache."""
    lines = [list(itertools.accumulate(median_curve(runs))) for runs in (result.cached, result.recomputed)]
    console.print(f"\nseconds since the start, over tokens generated after {result.num_prompt} (upper line: without)")
    highest = f"{max(line[-1] for line in lines):.1f}"
    for index, row in enumerate(line_chart(lines, _CHART_WIDTH, _CHART_HEIGHT)):
        console.print(f"{highest if index == 0 else '0' if index == _CHART_HEIGHT - 1 else '':>7} {row}")
    console.print(f"{'':>8}1{result.num_output:>{_CHART_WIDTH - 1}}")


def _print_fits(console: Console, results: Sequence[PromptResult]) -> None:
    console.print("\none more token after L tokens of context, fitted over all of the above")
    for name, fit in zip(("with   ", "without"), fit_results(results), strict=True):
        console.print(f"  {name} {_fit_line(fit)}")


def _fit_line(fit: CostFit | None) -> str:
    if fit is None:
        return "too few points for a fit"
    sign = "-" if fit.slope_seconds < 0 else "+"
    slope = f"{sign} {1e6 * abs(fit.slope_seconds):.2f} µs × L"
    formula = f"{1e3 * fit.base_seconds:.2f} ms {slope} (R² {fit.r_squared:.3f})"
    if fit.quadratic_from_tokens is None or fit.r_squared < _CLEAR_R_SQUARED:
        return f"{formula}: no clear growth above the scatter, the total is linear as far as this shows"
    return f"{formula}: the total turns from linear to quadratic at about {fit.quadratic_from_tokens:,.0f} tokens"


def _prompt_json(result: PromptResult, num_layers: int) -> dict[str, Any]:
    expected = {
        "with_cache": cached_work(result.num_prompt, result.num_output),
        "without_cache": recompute_work(result.num_prompt, result.num_output),
    }
    ways = {"with_cache": result.cached, "without_cache": result.recomputed}
    return {
        "prompt_tokens": result.num_prompt,
        "output_tokens": result.num_output,
        "ratio": result.ratio,
        "tokens_equal": result.num_agreeing,
        "partings": [dataclasses.asdict(parting) for parting in result.partings],
        **{name: _way_json(runs, result.num_output, num_layers) for name, runs in ways.items()},
        "kv_expected": {name: work.num_computed * num_layers for name, work in expected.items()},
    }


def _way_json(runs: Sequence[Run], num_output: int, num_layers: int) -> dict[str, Any]:
    curve = median_curve(runs)
    return {
        "seconds": median_total(runs),
        "tokens_per_s": num_output / median_total(runs),
        "first_token_s": curve[0],
        "further_tokens_s": dataclasses.asdict(growth(curve)),
        "kv_computed": runs[0].work.num_computed * num_layers,
        "kv_reused": runs[0].work.num_reused * num_layers,
        "repeat_seconds": [sum(run.token_seconds) for run in runs],
        "token_seconds": [round(seconds, 6) for seconds in curve],
    }


def _fit_json(fit: CostFit | None) -> dict[str, float | None] | None:
    if fit is None:
        return None
    return {**dataclasses.asdict(fit), "quadratic_from_tokens": fit.quadratic_from_tokens}
