"""Puts this folder on the path, so that its tests can import its helpers (pytest's importlib mode does not)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _on_one_thread(one_thread: None) -> None:
    pass
