"""bench/gpu.py where there is no GPU: all its own sections run under the interpreter, and find nothing wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "bench" / "gpu.py"
SECTIONS = ("kernels", "decode", "prefill", "engine")


def dry_run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The launch of a machine with a GPU, where nobody has set the variable.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--dry-run", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("gpu") / "dry.json"
    return dry_run(out, "--sections", *SECTIONS), out


def test_every_section_runs_and_is_right(done: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    result, out = done
    assert result.returncode == 0, result.stderr
    content = json.loads(out.read_text(encoding="utf-8"))
    rows = content["rows"]
    assert {row["section"] for row in rows} == {"ceilings", *SECTIONS}
    assert [row["case"] for row in rows if row["failure"] is not None] == []
    checked = [row for row in rows if row["error"] is not None]
    assert {row["section"] for row in checked} == {"kernels", "decode", "prefill"}
    assert all(row["error"] <= row["limit"] for row in checked)
    (engine, *_) = [row for row in rows if row["section"] == "engine" and row["seconds"] is not None]
    assert engine["values"].keys() >= {"tokens_per_s", "roofline_tokens_per_s", "gpu_idle_s", "host_s", "kernels_s"}


def test_the_table_says_that_its_times_mean_nothing(done: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    result, _ = done
    assert "no time means anything" in result.stdout
    assert " 0 failures, 0 skipped" in result.stdout
    times = [line for line in result.stdout.splitlines() if "TFLOP/s" in line or "tok/s" in line]
    assert times
    assert all("~" in line for line in times)


def test_what_has_no_time_is_skipped_and_named(tmp_path: Path) -> None:
    result = dry_run(tmp_path / "dry.json", "--sections", "decode", "--budget", "0")
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "dry.json").read_text(encoding="utf-8"))["rows"]
    assert all(row["notes"] == ["skipped: out of time"] for row in rows if row["section"] == "decode")
