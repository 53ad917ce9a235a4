"""Terminal plots, cell by cell."""

from __future__ import annotations

from octavo.server.bench.plot_text import bar, line_chart


def test_bars_are_proportional_in_eighths() -> None:
    assert bar(10, 10, 4) == "████"
    assert bar(5, 10, 4) == "██"
    assert bar(1, 32, 4) == "▏"
    assert bar(0.001, 1000, 4) == "▏"
    assert bar(0, 10, 4) == ""
    assert bar(0, 0, 4) == ""


def test_a_rising_line_goes_from_the_lower_left_to_the_upper_right() -> None:
    rows = line_chart([[0.0, 1.0, 2.0, 3.0]], width=2, height=1)
    assert rows == ["⡠⠊"]


def test_lines_share_one_scale() -> None:
    rows = line_chart([[4.0, 4.0], [0.0, 0.0]], width=1, height=2)
    assert rows == ["⠉", "⣀"]


def test_nothing_gives_an_empty_chart() -> None:
    assert line_chart([], width=2, height=1) == ["⠀⠀"]
