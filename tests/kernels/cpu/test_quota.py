"""Threads under a control group's limit of CPU time."""

from __future__ import annotations

from pathlib import Path

import pytest
from octavo.kernels.cpu.quota import usable_threads


@pytest.fixture(autouse=True)
def _nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_without_a_limit_all_threads_run(tmp_path: Path) -> None:
    assert usable_threads(8, tmp_path) == 8
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_threads(8, tmp_path) == 8


@pytest.mark.parametrize(
    ("limit", "threads"), [("200000 100000", 2), ("250000 100000", 3), ("50000 100000", 1), ("900000 100000", 8)]
)
def test_no_more_threads_than_cores_of_time(tmp_path: Path, limit: str, threads: int) -> None:
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert usable_threads(8, tmp_path) == threads


@pytest.mark.parametrize(("quota", "threads"), [("-1", 8), ("150000", 2)])
def test_version_1_control_groups_count(tmp_path: Path, quota: str, threads: int) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota + "\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert usable_threads(8, tmp_path) == threads


def test_what_a_user_asks_for_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert usable_threads(4, tmp_path) == 4
