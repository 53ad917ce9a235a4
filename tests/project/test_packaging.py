"""What a user gets: the wheel's contents, the list of packages, and what each process really imports."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("server", "scheduler", "block_manager", "kernels", "model")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tracked files, as from a clean checkout."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True, cwd=source)
    (built,) = out.glob("*.whl")
    return built


def test_every_package_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(settings["tool"]["setuptools"]["packages"])
    found = {
        "octavo." + ".".join(path.relative_to(ROOT).parts)
        for room in ROOMS
        for path in [ROOT / room, *(p for p in (ROOT / room).rglob("*") if p.is_dir())]
        if any(path.glob("*.py"))
    }
    assert listed == found


def test_kernels_stays_a_namespace_folder() -> None:
    # A regular package of this name on sys.path would be taken for Hugging Face's `kernels`.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_installs_nothing_outside_the_namespace(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"octavo"}
    modules = {name for name in names if name.endswith(".py")}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            assert f"octavo/{path.relative_to(ROOT).as_posix()}" in modules
        assert f"octavo/{room}/py.typed" in names


def test_wheel_gives_a_working_command(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    code = "import octavo.server.cli as c, sys; print(c.__file__); sys.exit(c.main(['serve', '--help']))"
    shown = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(target)!r})\n{code}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert str(target) in shown.stdout
    assert "--kv-cache-memory" in shown.stdout


def modules_after(code: str) -> set[str]:
    shown = subprocess.run(
        [sys.executable, "-P", "-c", f"{code}\nimport sys; print('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.split(".")[0] for name in shown.stdout.split()}


def test_http_process_imports_no_torch() -> None:
    loaded = modules_after(
        "import octavo.server.cli, octavo.server.serve\n"
        "from octavo.model.weights.resolve import resolve_model\n"
        "from octavo.server.tokenizer import load_tokenizer\n"
        "load_tokenizer(resolve_model(None))"
    )
    assert not loaded & {"torch", "transformers", "triton"}


def test_engine_process_imports_nothing_of_http() -> None:
    loaded = modules_after("import octavo.server.engine.worker, octavo.server.engine.startup")
    assert "torch" in loaded
    assert not loaded & {"fastapi", "starlette", "uvicorn", "prometheus_client", "jinja2", "pydantic"}
