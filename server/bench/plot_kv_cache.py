"""The picture of `octavo bench kv-cache`. Needs matplotlib: the extra `plot`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from .kv_cache import PromptResult, median_curve

_CLASSIC_RATIO = 21.8 / 4.5
"""The figure that is usually quoted: 21.8 s without, 4.5 s with the cache, for 100 tokens."""


def save_plot(results: Sequence[PromptResult], title: str, path: Path) -> None:
    """Two panels: cumulative seconds over generated tokens, and the ratio by prompt length. Raises OSError."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _plot_curves(left, results)
    _plot_ratios(right, results)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120, format="png")


def _plot_curves(axes: Axes, results: Sequence[PromptResult]) -> None:
    """Logarithmic seconds, or the lines with the cache would all lie on the axis."""
    for index, result in enumerate(results):
        for runs, style in ((result.cached, "-"), (result.recomputed, "--")):
            cumulative = list(itertools.accumulate(median_curve(runs)))
            label = f"{result.num_prompt} tokens of prompt" if style == "-" else None
            axes.plot(range(1, len(cumulative) + 1), cumulative, style, color=f"C{index}", label=label)
    axes.set_yscale("log")
    axes.set_xlabel("generated tokens")
    axes.set_ylabel("seconds since the start")
    axes.set_title("solid: with the K/V cache; dashed: everything recomputed", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()


def _plot_ratios(axes: Axes, results: Sequence[PromptResult]) -> None:
    names = [str(result.num_prompt) for result in results]
    bars = axes.bar(names, [result.ratio for result in results])
    axes.bar_label(bars, [f"{result.ratio:.1f}×" for result in results])
    axes.axhline(_CLASSIC_RATIO, color="grey", linestyle=":", label="21.8 s / 4.5 s, the classic figure")
    axes.set_yscale("log")
    axes.set_ylim(bottom=min(1.0, 0.8 * min(result.ratio for result in results)))  # 1: the cache gains nothing
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens of prompt")
    axes.set_ylabel("seconds without / seconds with the cache")
    axes.set_title(f"time of {results[0].num_output} tokens", fontsize=10)
    axes.legend()
