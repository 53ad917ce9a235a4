"""Settings of the whole suite, and the record of which models were seen to work.

A test that takes the fixture `proves` states what it has shown. With `--record-models FILE` these statements of the
tests that pass are kept there, by test; docs/models.md is made of them (`make models-table`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Triton kernels are tested under its interpreter, which must be chosen before anything imports triton.
os.environ["TRITON_INTERPRET"] = "1"

_FACTS = "models"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-models", metavar="FILE", type=Path, help="keep what the tests show of models")
    parser.addoption("--list-model-tests", action="store_true", help="with --collect-only: name the tests that show it")


@pytest.fixture
def proves(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Call it last, with `architecture`, `path` (native or generic), `weights` (safetensors or GGUF, and the encoding
    where it is not plain) and `backend`."""
    return lambda **facts: request.node.user_properties.append((_FACTS, facts))


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("--list-model-tests"):
        for item in session.items:
            if "proves" in getattr(item, "fixturenames", ()):
                print(f"proves {item.nodeid}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    file: Path | None = item.config.getoption("--record-models")
    if file is not None and report.when == "call" and "proves" in getattr(item, "fixturenames", ()):
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        known.pop(item.nodeid, None)
        for name, facts in item.user_properties:
            if name == _FACTS and report.passed:
                known[item.nodeid] = facts
        file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return report
