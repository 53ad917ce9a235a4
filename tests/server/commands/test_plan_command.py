"""`octavo plan` on the command line: settings, answers, JSON, and one line for every mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from octavo.server.cli import main

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
ON_CUDA = ("--device", "cuda", "--memory", "24GiB")


@pytest.fixture
def model(tmp_path: Path) -> str:
    directory = tmp_path / "llama-8b"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA_8B))
    return str(directory)


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == status
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plan


def test_a_report_says_what_the_server_would_say_and_how_to_start_it(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", model, *ON_CUDA, "--context", "8192", "--concurrency", "4"]) == 0
    text = capsys.readouterr().out
    assert "           LlamaForCausalLM, bfloat16 on cuda, triton backend, weights 14.96 GiB\n" in text
    assert "  limits   8192 tokens per sequence, 4 sequences at once, 8192 tokens per step\n" in text
    assert "  layers   32 of 8 K/V heads × 128: 128 KiB per token\n" in text
    assert "  asked    4 sequences of 8192 tokens fit at once\n" in text
    assert "Serve it so (with its safetensors beside config.json):\n" in text
    command = f"octavo serve {model} --device cuda --dtype bfloat16 --max-num-seqs 4 --max-model-len 8192"
    assert command in text


def test_json_holds_the_same_under_stable_names(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan = as_json(capsys, model, *ON_CUDA, "--kv-cache-memory", "4GiB", "--context", "8192")
    assert set(plan) == {"octavo", "model", "memory", "server", "asked", "dtypes", "contexts", "notes"}
    assert plan["model"]["num_parameters"] == 8_030_261_248
    assert plan["memory"] == {"device": "cuda", "free_bytes": 24 * 2**30, "total_bytes": 24 * 2**30}
    assert plan["server"]["num_blocks"] == 1023
    assert plan["server"]["command"][-2:] == ["--kv-cache-memory", "4GiB"]
    assert plan["asked"] == {"context": 8192, "concurrency": 1, "fits": True}
    assert [entry["dtype"] for entry in plan["dtypes"]] == ["float32", "bfloat16", "float16"]
    assert [entry["most_sequences"]["value"] for entry in plan["dtypes"]] == [0, 3, 3]
    assert [entry["context"] for entry in plan["contexts"]] == [2**power for power in range(10, 18)]


def test_the_printed_command_makes_the_same_plan_again(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever was fitted is given in full, so that nothing depends on the memory that is free then."""
    for extra in ((), ("--concurrency", "3"), ("--block-size", "16", "--max-num-batched-tokens", "4096")):
        first = as_json(capsys, model, *ON_CUDA, *extra)["server"]
        again = as_json(capsys, *first["command"][2:], "--memory", "60GiB")["server"]
        assert again == first


def test_the_servers_environment_counts_and_the_command_line_wins(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_BLOCK_SIZE", "64")
    monkeypatch.setenv("OCTAVO_MAX_NUM_SEQS", "7")
    monkeypatch.setenv("OCTAVO_ENABLE_PREFIX_CACHING", "off")
    server = as_json(capsys, model, *ON_CUDA)["server"]
    assert (server["block_size"], server["max_num_seqs"], server["prefix_caching"]) == (64, 7, False)
    server = as_json(capsys, model, *ON_CUDA, "--block-size", "16", "--concurrency", "9")["server"]
    assert (server["block_size"], server["max_num_seqs"]) == (16, 9)


def test_the_printed_command_carries_every_setting_that_is_not_the_default(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("enable_prefix_caching: false\nkernel_backend: reference\n")
    command = as_json(capsys, model, *ON_CUDA, "--config", str(config))["server"]["command"]
    assert "--no-enable-prefix-caching" in command
    assert command[command.index("--kernel-backend") + 1] == "reference"
    plain = as_json(capsys, model, *ON_CUDA)["server"]["command"]
    assert "--kernel-backend" not in plain
    assert not any("prefix" in word for word in plain)


@pytest.mark.parametrize("question", [("--context", "8192"), ("--context", "8192", "--concurrency", "4")])
def test_an_answer_that_the_planned_server_does_not_hold_comes_with_the_settings_of_one_that_does(
    model: str, capsys: pytest.CaptureFixture[str], question: tuple[str, ...]
) -> None:
    # A backend that sets much memory aside for its steps: what it holds depends on the settings most.
    question = (*question, "--kernel-backend", "reference")
    wide = ("--max-num-seqs", "256")
    assert main(["plan", model, *ON_CUDA, *question, *wide]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Its pool is sized for 256 ")]
    found = re.search(r"To hold (\d+) of (\d+) tokens at once, plan with (.*)\.$", line)
    assert found is not None
    number, length, settings = found.groups()
    asked = ("--context", length, "--concurrency", number, "--kernel-backend", "reference")
    assert main(["plan", model, *ON_CUDA, *asked, *settings.split()]) == 0
    text = capsys.readouterr().out
    assert f"asked    {number} sequences of {length} tokens fit at once" in text
    assert "Its pool is sized" not in text


def test_what_does_not_fit_is_said(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model, *ON_CUDA, "--context", "32768", "--concurrency", "16"]) == 0
    text = capsys.readouterr().out
    assert "asked    16 sequences of 32768 tokens do not fit at once" in text
    assert "most sequences of 32768 tokens" in text


def test_a_model_that_is_not_served_gets_numbers_but_no_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    config = LLAMA_8B | small | {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "sliding_window": 64}
    config |= {"num_local_experts": 4, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path), *ON_CUDA]) == 1  # what `octavo serve` would end with
    text = capsys.readouterr().out
    assert "this release does not serve GptOssForCausalLM yet" in text
    assert "window of 64" in text
    assert "octavo serve" not in text
    assert as_json(capsys, str(tmp_path), *ON_CUDA, status=1)["server"]["command"] is None


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--memory", "lots"), 2, "--memory: expected a size such as 8GiB"),
        (("--context", "0"), 2, "--context: expected a number from 1"),
        (("--concurrency", "x"), 2, "--concurrency: .* \\(given: 'x'\\)"),
        (("--block-size", "17"), 2, "--block-size: expected one of 16, 32, 64"),
        (("--device", "cuda"), 2, "--device cuda: .* give its memory, such as --memory 24GiB"),
        (("--context", "9", "--max-model-len", "8"), 2, "--context 9 is longer than --max-model-len 8"),
        (("--concurrency", "9", "--max-num-seqs", "8"), 2, "--concurrency 9 is more than --max-num-seqs 8"),
        (("--memory", "1GiB"), 1, "the weights take .* more than the 1.00 GiB"),
        (("--memory", "64GiB", "--context", "200000"), 1, "max_model_len 200000 exceeds the 131072 positions"),
    ],
)
def test_mistakes_are_one_line_and_a_status(
    model: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    status: int,
    message: str,
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["plan", model, *arguments]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err)


def test_an_interrupt_ends_without_a_traceback(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import octavo.model.header as header

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(header, "read_header", interrupted)
    assert main(["plan", model, "--memory", "64GiB"]) == 130
