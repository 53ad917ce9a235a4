"""A scripted engine (`scripted_engine` is importable because of the conftest.py above)."""

from __future__ import annotations

import pytest
from octavo.server.engine.core import EngineCore
from scripted_engine import ScriptedRunner, core_of


@pytest.fixture
def runner() -> ScriptedRunner:
    return ScriptedRunner()


@pytest.fixture
def core(runner: ScriptedRunner) -> EngineCore:
    return core_of(runner)
