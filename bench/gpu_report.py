"""The table that bench/gpu.py prints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gpu_measure import GIB, Row

_CASE_WIDTH = 58
_HEADINGS = ("case", "µs", "rate", "of limit", "error", "notes")
_MEANINGLESS = (
    "A DRY RUN under Triton's interpreter: that everything runs and is right is all it says; no time means anything."
)


def table(rows: Sequence[Row], machine: dict[str, Any], *, dry: bool, seconds: float) -> str:
    """Sections one below the other, then the count of what failed. Times of a dry run bear a ~."""
    lines = [_machine_line(machine), *([_MEANINGLESS] if dry else []), ""]
    cells = [_cells(row, dry) for row in rows]
    widths = [max(len(heading), *(len(c[i]) for c in cells)) for i, heading in enumerate(_HEADINGS[:-1])]
    lines.append(_line(_HEADINGS, widths))
    section = ""
    for row, line in zip(rows, cells, strict=True):
        if row.section != section:
            section = row.section
            lines.append(f"── {section} ".ljust(sum(widths) + 2 * len(widths) + 20, "─"))
        lines.append(_line(line, widths))
    return "\n".join([*lines, "", _verdict(rows, seconds)])


def _machine_line(machine: dict[str, Any]) -> str:
    memory = f", {machine['memory_bytes'] / GIB:.0f} GiB" if machine["memory_bytes"] else ""
    packages = ", ".join(f"{name} {found}" for name, found in machine["packages"].items() if found)
    return f"{machine['device']}{memory}; Python {machine['python']}; {packages}"


def _cells(row: Row, dry: bool) -> tuple[str, ...]:
    about = "~" if dry else ""
    # The notes of what was timed hold times too.
    notes = [f"{about}{note}" for note in row.notes] if row.seconds is not None else row.notes
    error = "" if row.error is None else "inf" if math.isinf(row.error) else f"{row.error:.1e}"
    return (
        row.case if len(row.case) <= _CASE_WIDTH else row.case[: _CASE_WIDTH - 1] + "…",
        "" if row.seconds is None else f"{about}{1e6 * row.seconds:,.1f}",
        "" if row.rate is None else f"{about}{row.rate:,.{_digits(row.rate)}f} {row.unit}",
        "" if row.fraction is None else f"{about}{100 * row.fraction:.1f} %",
        error,
        "; ".join([*([f"FAILED: {row.failure}"] if row.failure else []), *notes]),
    )


def _digits(value: float) -> int:
    return 0 if value >= 100 else 1 if value >= 10 else 3


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The case and the notes to the left, numbers to the right."""
    case = cells[0].ljust(widths[0])
    numbers = [cell.rjust(width) for cell, width in zip(cells[1:-1], widths[1:], strict=True)]
    return "  ".join([case, *numbers, cells[-1]]).rstrip()


def _verdict(rows: Sequence[Row], seconds: float) -> str:
    checked = sum(row.error is not None for row in rows)
    failed = sum(row.failure is not None for row in rows)
    skipped = sum(any(note.startswith("skipped") for note in row.notes) for row in rows)
    goals = [row.values["goal_met"] for row in rows if "goal_met" in row.values]
    parts = [f"{checked} results checked", f"{failed} failures", f"{skipped} skipped"]
    if goals:
        parts.append(f"{sum(goals)} of {len(goals)} goals of decode attention met")
    return f"{', '.join(parts)}; {seconds:.0f} s"
