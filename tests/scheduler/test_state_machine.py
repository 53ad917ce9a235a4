"""The machine of engine_machine.py, run: the code survives it, and no seeded bug does."""

from __future__ import annotations

import logging
import os

import pytest
from engine_machine import EngineMachine
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from seeded_bugs import BUGS
from seeded_window_bugs import WINDOW_BUGS

# Every poisoned request is logged with its traceback, thousands of times here.
logging.getLogger("octavo.engine").setLevel(logging.CRITICAL)

# 2,000 examples of 60 steps are the goal of a nightly run (OCTAVO_FUZZ_EXAMPLES=2000); the suite takes a sample.
EXAMPLES = int(os.environ.get("OCTAVO_FUZZ_EXAMPLES", "150"))
EngineMachine.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    # Shrinking a failure takes minutes; ask for it when there is one to look at.
    phases=list(Phase) if os.environ.get("OCTAVO_FUZZ_SHRINK") else [Phase.explicit, Phase.reuse, Phase.generate],
)
test_engine_survives_anything = EngineMachine.TestCase


@pytest.mark.parametrize("bug", [*BUGS, *WINDOW_BUGS], ids=lambda bug: bug.__name__)
def test_seeded_bug_is_caught(bug: object, monkeypatch: pytest.MonkeyPatch) -> None:
    bug(monkeypatch)  # type: ignore[operator]
    search = settings(
        max_examples=1000,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    with pytest.raises(Exception):  # noqa: B017, PT011 - whichever check sees it first
        run_state_machine_as_test(EngineMachine, settings=search)
