"""The walls of docs/architecture.md, held by reading the code: who may import whom, and how large things get."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("server", "scheduler", "block_manager", "kernels", "model")
MAY_IMPORT = {
    "server": {"scheduler", "model"},
    "model": {"kernels", "scheduler"},
    "scheduler": {"block_manager"},
    "block_manager": set(),
    "kernels": set(),
}
# Of the scheduler, the model room may know the contract types only.
SCHEDULER_CONTRACT = {"batch", "sampling_params"}
WITHOUT_TORCH = {"scheduler", "block_manager"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def files(room: str) -> Iterator[Path]:
    return (path for path in sorted((ROOT / room).rglob("*.py")))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything a file of a room imports, `octavo.` for our own."""
    package = ["octavo", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    wrong = []
    for path in files(room):
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] != "octavo" or parts[1] == room:
                continue
            allowed = parts[1] in MAY_IMPORT[room]
            if room == "model" and parts[1] == "scheduler":
                allowed = parts[2] in SCHEDULER_CONTRACT
            if not allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_use_relative_imports_for_their_own(room: str) -> None:
    wrong = []
    for path in files(room):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            absolute = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                absolute = [node.module or ""]
            wrong += [f"{path}:{node.lineno} {name}" for name in absolute if name.split(".")[0] in ("octavo", *ROOMS)]
    assert not wrong


@pytest.mark.parametrize("room", sorted(WITHOUT_TORCH))
def test_scheduling_is_pure_python(room: str) -> None:
    used = {name.split(".")[0] for path in files(room) for _, name in imports(path)}
    assert not used & {"torch", "numpy", "triton", "transformers"}


def test_only_metrics_touches_prometheus() -> None:
    users = [path.name for room in ROOMS for path in files(room) if any("prometheus" in n for _, n in imports(path))]
    assert users == ["metrics.py"]


def test_nothing_is_pickled_or_evaluated() -> None:
    wrong = []
    for room in ROOMS:
        for path in files(room):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            wrong += [
                f"{path}:{line} {name}" for line, name in imports(path) if name.split(".")[0] in ("pickle", "dill")
            ]
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                    wrong.append(f"{path}:{node.lineno} {node.func.id}")
                refused = isinstance(node, ast.keyword) and ast.unparse(node.value) == "False"
                if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and not refused:
                    wrong.append(f"{path}:{node.lineno} trust_remote_code")
    assert not wrong


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_stay_small(room: str) -> None:
    large = []
    for path in files(room):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > MAX_FILE_LINES:
            large.append(f"{path.relative_to(ROOT)} has {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    large.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines")
    assert not large
