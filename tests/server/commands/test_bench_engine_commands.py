"""`octavo bench kv-cache` and `octavo bench roofline` from the command line to their files, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from octavo.kernels.select import label, select_backend
from octavo.server.bench import ceilings, kv_cache_engine, kv_cache_measure, kv_cache_report, roofline_steps
from octavo.server.bench.kv_cache import Parting
from octavo.server.cli import main

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from tiny_checkpoint import save_tiny_checkpoint

BACKEND = label(select_backend("auto", torch.device("cpu"), torch.float32, 16))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings._READ_BYTES, "cpu", 2**20)
    monkeypatch.setitem(ceilings._SQUARES, "cpu", (32,))


def kv_cache(model: str, *arguments: str) -> int:
    return main(["bench", "kv-cache", "--model", model, "--dtype", "float32", "--device", "cpu", *arguments])


def roofline(model: str, *arguments: str) -> int:
    return main(["bench", "roofline", "--model", model, "--dtype", "float32", "--device", "cpu", *arguments])


def test_kv_cache_shows_and_writes_what_it_measured(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, picture = tmp_path / "r.json", tmp_path / "r.png"
    sizes = ["--prompt-tokens", "60,5", "--output-tokens", "8", "--repeats", "2"]
    assert kv_cache(model, *sizes, "--json", str(result), "--png", str(picture)) == 0
    shown = capsys.readouterr().out
    assert "prompt 5: 8 of 8 tokens are equal" in shown
    assert f"float32, {BACKEND} backend" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    content = json.loads(result.read_text())
    assert content["engine"]["num_layers"] == 2
    assert content["machine"]["num_cores"] >= 1
    assert [prompt["prompt_tokens"] for prompt in content["prompts"]] == [5, 60]
    for prompt in content["prompts"]:
        length, with_cache, without = prompt["prompt_tokens"], prompt["with_cache"], prompt["without_cache"]
        assert prompt["tokens_equal"] == 8
        assert with_cache["kv_computed"] == 2 * (length + 7)
        assert without["kv_computed"] == 2 * sum(range(length, length + 8))
        assert with_cache["kv_computed"] + with_cache["kv_reused"] == without["kv_computed"]
        assert len(with_cache["repeat_seconds"]) == len(without["repeat_seconds"]) == 2
        assert prompt["ratio"] == pytest.approx(without["seconds"] / with_cache["seconds"])
    assert set(content["seconds_per_token_by_context"]) == {"with_cache", "without_cache"}


def test_different_tokens_are_shown_and_fail(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kv_cache_measure, "differing", lambda cached, recomputed: {1: 7})
    assert kv_cache(model, "--prompt-tokens", "4", "--output-tokens", "4", "--repeats", "1") == 1
    shown = capsys.readouterr().out
    assert "3 of 4 tokens are equal" in shown
    assert "MORE THAN ROUNDING" in shown


def test_near_ties_are_shown_and_excused(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tie = Parting(2, 11, 12, 0.125, True)
    monkeypatch.setattr(kv_cache_engine.BenchEngine, "explain", lambda *arguments: [tie])
    assert kv_cache(model, "--prompt-tokens", "4", "--output-tokens", "4", "--repeats", "1") == 0
    assert "parted at token 2: 11 with the cache, 12 without, 0.1250 apart" in capsys.readouterr().out


@pytest.mark.usefixtures("small_ceilings")
def test_roofline_shows_and_writes_what_it_measured(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "r.json"
    sizes = ["--batch", "1,3", "--context", "20,70", "--prefill", "16", "--repeats", "2"]
    assert roofline(model, *sizes, "--json", str(result)) == 0
    shown = capsys.readouterr().out
    assert f"float32, {BACKEND} backend" in shown
    assert "thread" in shown
    content = json.loads(result.read_text())
    shapes = [(step["kind"], step["num_rows"], step["num_context"], step["num_new"]) for step in content["steps"]]
    assert shapes == [
        *[("decode", rows, context, 1) for rows in (1, 3) for context in (20, 70)],
        ("prefill", 1, 0, 16),
        ("prefill", 1, 70, 16),
    ]
    taken = content["ceilings"]["taken"]
    layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96
    assert content["model_cost"]["weight_bytes"] == 4 * (2 * layer + 320 * 64 + 5 * 64)
    for step in content["steps"]:
        assert step["memory_s"] == pytest.approx(step["num_bytes"] / taken["bytes_per_s"])
        assert step["compute_s"] == pytest.approx(step["flops"] / taken["flops_per_s"])
        assert step["floor_s"] == max(step["memory_s"], step["compute_s"])
        assert step["fraction"] == pytest.approx(step["floor_s"] / step["median_s"])
        assert len(step["seconds"]) == 2
        assert min(step["seconds"]) > 0
    assert content["skipped"] == []


def test_results_are_written_even_if_they_cannot_be_shown(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("cannot be shown")

    monkeypatch.setattr(kv_cache_report, "print_report", fail)
    small = ["--prompt-tokens", "4", "--output-tokens", "2", "--repeats", "1"]
    with pytest.raises(RuntimeError, match="cannot be shown"):
        kv_cache(model, *small, "--json", str(tmp_path / "r.json"))
    assert json.loads((tmp_path / "r.json").read_text())["measurement"] == "kv-cache"


@pytest.mark.usefixtures("small_ceilings")
def test_results_are_shown_even_if_they_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The directory's name would be markup, and is shown as it is.
    directory = tmp_path / "my[bold]model"
    directory.mkdir()
    model = str(save_tiny_checkpoint(directory))
    result = tmp_path / "r.json"
    monkeypatch.setattr(roofline_steps.StepBench, "measure", lambda *_: result.mkdir(exist_ok=True) or [1.0])
    assert roofline(model, "--batch", "1", "--context", "8", "--prefill", "4", "--json", str(result)) == 2
    captured = capsys.readouterr()
    assert "my[bold]model, float32" in captured.out
    assert f"octavo: cannot write {result}: Is a directory\n" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-tokens", "16,,3"], "--prompt-tokens: expected whole numbers"),
        (["--prompt-tokens", "0"], "--prompt-tokens: expected whole numbers"),
        (["--output-tokens", "1"], "--output-tokens: expected a whole number from 2"),
        (["--repeats", "none"], "--repeats: expected a whole number from 1"),
        (["--seed", "-1"], "--seed: expected a whole number from 0"),
        (["--prompt-tokens", "200", "--output-tokens", "57"], "the model knows 256 positions"),
        (["--json", "/nowhere/at/all.json"], "--json: there is no directory"),
        (["--png", "."], "--png: . is a directory"),
        (["--block-size", "17"], "--block-size: expected one of"),
    ],
)
def test_silly_kv_cache_arguments_end_in_one_line(
    model: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kv_cache(model, *arguments) == 2
    assert one_line(capsys, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "x"], "--batch: expected whole numbers"),
        (["--batch", "1,65537"], "--batch: expected whole numbers from 1 to 65536"),
        (["--context", "-3"], "--context: expected whole numbers"),
        (["--prefill", "1"], "--prefill: expected whole numbers from 2"),
        (["--context", "200", "--prefill", "57"], "the model knows 256 positions"),
        (["--repeats", "0"], "--repeats: expected a whole number from 1"),
        (["--json", "/nowhere/at/all.json"], "--json: there is no directory"),
    ],
)
def test_silly_roofline_arguments_end_in_one_line(
    model: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert roofline(model, *arguments) == 2
    assert one_line(capsys, message)


def test_a_missing_matplotlib_is_named_before_anything_is_measured(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert kv_cache(model, "--png", str(tmp_path / "r.png")) == 2
    assert one_line(capsys, "pip install 'octavo[plot]'")


def test_a_model_that_is_not_there_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for measurement in ("kv-cache", "roofline"):
        assert main(["bench", measurement, "--model", "./nowhere"]) == 1
        assert one_line(capsys, "no such file or directory")
    assert main(["bench", "roofline", "--model", "./no\x1b[2Jwhere"]) == 1
    assert one_line(capsys, "no[2Jwhere")


def test_an_interrupt_ends_both_with_status_130_and_nothing_more(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kv_cache_measure, "measure", interrupt)
    monkeypatch.setattr(ceilings, "measure_ceilings", interrupt)
    assert kv_cache(model, "--prompt-tokens", "4", "--output-tokens", "4") == 130
    assert capsys.readouterr() == ("", "")
    assert roofline(model, "--context", "20", "--prefill", "16") == 130
    assert capsys.readouterr() == ("", "measuring the machine\n")


def one_line(capsys: pytest.CaptureFixture[str], message: str) -> bool:
    """Whether all that was printed is one line on stderr that says this."""
    captured = capsys.readouterr()
    return captured.out == "" and captured.err.count("\n") == 1 and message in captured.err
