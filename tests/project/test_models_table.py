"""docs/models.md promises what tests have shown, and no more: its table is made of what they wrote as they passed, and
every test behind it is still there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ("tests/model/families", "tests/model/generic", "tests/model/weights/test_quantized_formats.py")


def test_the_table_is_what_the_tests_have_recorded() -> None:
    checked = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "models_table.py"), "--check"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr


def test_the_recorded_tests_are_those_that_there_are() -> None:
    """No row outlives its test, and no test of a model is without its row."""
    recorded = set(json.loads((ROOT / "docs" / "models.json").read_text(encoding="utf-8")))
    command = [sys.executable, "-m", "pytest", "--collect-only", "--list-model-tests", "-p", "no:cacheprovider"]
    listed = subprocess.run([*command, *TESTS], cwd=ROOT, capture_output=True, text=True, check=True)
    there = {line.removeprefix("proves ") for line in listed.stdout.splitlines() if line.startswith("proves ")}
    assert there
    assert recorded == there, "run make models-table"
