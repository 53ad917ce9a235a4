"""Sizes for people."""

from __future__ import annotations

import pytest
from octavo.model.sizes import size_text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 KiB"), (1536, "2 KiB"), (2**20, "1 MiB"), (98_400_000, "94 MiB"), (2**30 * 3 // 2, "1.50 GiB")],
)
def test_a_size_has_the_unit_that_suits_it(num_bytes: int, text: str) -> None:
    assert size_text(num_bytes) == text
