"""Puts this folder, the families' and the weights' on the path, so that these tests can import helpers (pytest's
importlib mode does not)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path += [str(Path(__file__).parents[1] / name) for name in ("generic", "families", "weights")]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small are not worth waking other threads for, least of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
