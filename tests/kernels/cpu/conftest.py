"""Contexts of the native library in every instruction set of this machine and both working types."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from octavo.kernels.cpu.library import NativeContext, supported_isas

ISAS = supported_isas()
DTYPES = (torch.float32, torch.bfloat16)
VARIANTS = [(isa, dtype) for isa in ISAS for dtype in DTYPES]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `native` runs in all variants; it is skipped where the library was not built."""
    if "native" not in metafunc.fixturenames:
        return
    if not VARIANTS:
        skip = pytest.mark.skip(reason="no native library for this machine")
        metafunc.parametrize("native", [pytest.param(None, marks=skip)], indirect=True)
        return
    names = [f"{isa}-{str(dtype).removeprefix('torch.')}" for isa, dtype in VARIANTS]
    metafunc.parametrize("native", VARIANTS, ids=names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def native(request: pytest.FixtureRequest) -> Iterator[NativeContext]:
    """Two threads, in one instruction set and working type."""
    isa, dtype = request.param
    with NativeContext(dtype, 2, isa) as context:
        yield context
