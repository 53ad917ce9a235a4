"""Small plots for a terminal, in block and braille characters."""

from __future__ import annotations

from collections.abc import Sequence

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_BRAILLE_BASE = 0x2800
_DOT_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bit of each dot in its cell, by column and row."""


def bar(value: float, maximum: float, width: int) -> str:
    """A bar of up to `width` cells, in eighths of a cell; anything above zero shows at least the thinnest one."""
    eighths = round(8 * width * value / maximum) if maximum > 0 else 0
    eighths = min(8 * width, max(eighths, 1 if value > 0 else 0))
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def line_chart(lines: Sequence[Sequence[float]], width: int, height: int) -> list[str]:
    """Several lines over a common index axis, each value from 0 to the largest of all: `height` rows of `width` braille
    cells, 2 × 4 dots each. Values must not be negative."""
    longest = max((len(line) for line in lines), default=0)
    maximum = max((max(line) for line in lines if line), default=0.0)
    cells = [[0] * width for _ in range(height)]
    for line in lines:
        for x in range(2 * width if line else 0):
            index = round(x * (longest - 1) / max(1, 2 * width - 1))
            if index < len(line):
                level = round(line[index] / maximum * (4 * height - 1)) if maximum > 0 else 0
                y = 4 * height - 1 - level
                cells[y // 4][x // 2] |= _DOT_BITS[x % 2][y % 4]
    return ["".join(chr(_BRAILLE_BASE + cell) for cell in row) for row in cells]
