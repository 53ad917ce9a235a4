"""Puts this folder, the families' and the weights' on the path, so that these tests can import helpers (pytest's
importlib mode does not)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parents[1] / name) for name in ("generic", "families", "weights")]


@pytest.fixture(autouse=True)
def _on_one_thread(one_thread: None) -> None:
    pass
