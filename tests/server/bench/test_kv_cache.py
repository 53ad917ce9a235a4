"""Counting, summing and fitting of `octavo bench kv-cache`, against the definitions spelled out."""

from __future__ import annotations

import pytest
from octavo.server.bench.kv_cache import (
    PromptResult,
    Run,
    Work,
    cached_work,
    fit_cost,
    fit_results,
    growth,
    median_curve,
    median_total,
    recompute_work,
)
from octavo.server.bench.kv_cache_measure import differing


@pytest.mark.parametrize(("num_prompt", "num_output"), [(1, 1), (1, 2), (16, 100), (512, 100)])
def test_work_is_what_a_token_by_token_count_gives(num_prompt: int, num_output: int) -> None:
    computed_with = reused = computed_without = 0
    in_pool = 0
    for index in range(num_output):
        context = num_prompt + index
        computed_with += context - in_pool
        reused += in_pool
        computed_without += context
        in_pool = context
    assert cached_work(num_prompt, num_output) == Work(computed_with, reused)
    assert recompute_work(num_prompt, num_output) == Work(computed_without, 0)


def run(token_ids: list[int], token_seconds: list[float] | None = None) -> Run:
    return Run(token_ids, token_seconds or [1.0] * len(token_ids), Work(0, 0))


def test_medians_are_per_generation_and_per_token() -> None:
    runs = [run([1, 2], [1.0, 5.0]), run([1, 2], [2.0, 1.0]), run([1, 2], [9.0, 3.0])]
    assert median_total(runs) == 6.0
    assert median_curve(runs) == [2.0, 3.0]
    assert PromptResult(4, runs, [run([1, 2], [30.0, 30.0])], []).ratio == 10.0


def test_growth_leaves_out_the_first_token() -> None:
    found = growth([100.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0])
    assert (found.first_quarter_seconds, found.last_quarter_seconds) == (1.0, 4.0)
    assert growth([5.0, 1.0]).last_quarter_seconds == 1.0


def test_an_exact_line_is_found_exactly() -> None:
    fit = fit_cost([10, 20, 30, 40], [0.05 + 0.001 * x for x in (10, 20, 30, 40)])
    assert fit is not None
    assert fit.base_seconds == pytest.approx(0.05)
    assert fit.slope_seconds == pytest.approx(0.001)
    assert fit.r_squared == pytest.approx(1.0)
    assert fit.quadratic_from_tokens == pytest.approx(100.0)  # where 0.05 n = 0.001 n² / 2


def test_constant_cost_never_turns_quadratic() -> None:
    fit = fit_cost([1, 2, 3], [0.5, 0.5, 0.5])
    assert fit is not None
    assert (fit.slope_seconds, fit.quadratic_from_tokens) == (0.0, None)


def test_too_few_points_give_no_fit() -> None:
    assert fit_cost([1, 2], [1.0, 2.0]) is None
    assert fit_cost([3, 3, 3], [1.0, 2.0, 3.0]) is None


def test_fits_pair_each_token_with_its_context() -> None:
    results = [
        PromptResult(
            length,
            [run([0] * 5, [99.0] + [0.2] * 4)],
            [run([0] * 5, [0.01 * (length + index) for index in range(5)])],
            [],
        )
        for length in (10, 50)
    ]
    with_cache, without = fit_results(results)
    assert with_cache is not None
    assert without is not None
    assert with_cache.base_seconds == pytest.approx(0.2)
    assert with_cache.slope_seconds == pytest.approx(0.0, abs=1e-12)
    assert without.base_seconds == pytest.approx(0.0, abs=1e-12)
    assert without.slope_seconds == pytest.approx(0.01)


def test_differences_of_recomputed_runs_all_count_those_of_cached_ones_up_to_the_first() -> None:
    reference = run([1, 2, 3, 4, 5])
    assert differing([reference, reference], [reference]) == {}
    assert differing([reference], [run([1, 9, 3, 8, 5])]) == {1: 9, 3: 8}
    assert differing([reference, run([1, 2, 7, 7, 7])], [reference]) == {2: 7}
