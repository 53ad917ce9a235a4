"""`octavo plan` against the engine that it speaks of: the same numbers, and the same words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch
from octavo.model.header import read_header
from octavo.model.plan import plan_model
from octavo.server.banner import capacity_lines
from octavo.server.cli import _parser, main
from octavo.server.commands.plan import plan_request
from octavo.server.engine.startup import build_engine
from octavo.server.options import resolve_options, server_config
from octavo.server.plan_report import expected_ready, serve_command
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from conftest import ServerProcess  # type: ignore[import-not-found]


def save_llama(directory: Path, **changes: Any) -> str:
    settings: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(settings | changes))).save_pretrained(directory)
    return str(directory)


def planned(model: str | None, **settings: str) -> tuple[Any, list[str]]:
    """What the plan expects the engine to say, and the arguments of `octavo serve` that it prints."""
    given = settings if model is None else {**settings, "model": model}
    values = resolve_options(given, {})
    header = read_header(values["model"])
    request, _ = plan_request(values, header.spec, memory=2**32, context=None, concurrency=None)
    plan = plan_model(header, request)
    return expected_ready(plan, values), serve_command(plan, values)[2:]


def started(arguments: list[str]) -> Any:
    """What the real engine says with these arguments."""
    given = dict(vars(_parser().parse_args(["serve", *arguments])))
    given["model"] = given.pop("model_positional")
    values = resolve_options(given, {})
    config = server_config(values, model_path=values["model"], model_name="m")
    _, ready = build_engine(config.engine)
    return ready


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ({}, {"dtype": "float32"}),
        ({}, {"dtype": "float32", "kv_cache_memory": "1MiB", "max_num_seqs": "2"}),
        (
            {"num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 3, "tie_word_embeddings": False},
            {"dtype": "bfloat16", "block_size": "64", "max_num_batched_tokens": "100", "max_model_len": "300"},
        ),
        (
            {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 3},
            {"dtype": "float16", "block_size": "16", "max_num_seqs": "700", "enable_prefix_caching": "off"},
        ),
    ],
    ids=["as it is", "small pool", "grouped, untied, blocks of 64, bfloat16", "biased, blocks of 16, float16"],
)
def test_an_engine_started_as_printed_says_what_was_planned(
    tmp_path: Path, shape: dict[str, Any], settings: dict[str, str]
) -> None:
    expected, command = planned(save_llama(tmp_path / "llama", **shape), device="cpu", **settings)
    ready = started(command)
    assert ready.prefix_caching is (settings.get("enable_prefix_caching") != "off")
    # Where the plan had to fit the context, the command says the fitted one: the server notes its backend at most.
    notes = [note for note in expected.notes if note.startswith("plain torch")]
    assert msgspec.structs.replace(ready, phases={}) == msgspec.structs.replace(expected, notes=notes)
    assert capacity_lines(ready) == capacity_lines(expected)


@pytest.mark.parametrize("kv_cache_memory", ["1MiB", "64MiB"])
def test_pools_of_windowed_layers_are_planned_as_they_are_served(tmp_path: Path, kv_cache_memory: str) -> None:
    """Gemma 3: some layers have a window, and a context is many times as long."""
    config = Gemma3TextConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, sliding_window=40, pad_token_id=0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    settings = {"device": "cpu", "dtype": "float32", "kv_cache_memory": kv_cache_memory, "max_num_seqs": "3"}
    expected, command = planned(str(tmp_path), **settings)
    ready = started(command)
    assert capacity_lines(ready) == capacity_lines(expected)
    assert ready.pool_blocks == expected.pool_blocks
    full, windowed = ready.pool_blocks
    assert windowed < full or kv_cache_memory == "1MiB"
    assert ready.max_model_len > 40


def test_a_config_alone_plans_what_its_engine_says(tmp_path: Path) -> None:
    """Before the weights are there, and after."""
    whole = Path(save_llama(tmp_path / "whole", num_key_value_heads=2, tie_word_embeddings=False))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_text((whole / "config.json").read_text())
    expected, command = planned(str(tmp_path / "bare"), device="cpu", dtype="float32")
    ready = started([str(whole), *command[1:]])
    assert capacity_lines(ready) == capacity_lines(expected)
    assert ready.weight_bytes == expected.weight_bytes


def test_the_pool_fitted_to_memory_is_the_one_that_a_start_with_so_much_would_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No flag but the model: both size the pool from what is free, the server after loading and the plan before."""
    import octavo.model.memory as memory

    model = save_llama(tmp_path / "llama")
    expected, _ = planned(model, device="cpu", dtype="float32")
    monkeypatch.setattr(memory, "available_cpu_bytes", lambda: 2**32 - expected.weight_bytes)
    ready = started([model, "--device", "cpu", "--dtype", "float32"])
    assert msgspec.structs.replace(ready, phases={}) == expected


@pytest.mark.real_model
def test_the_banner_of_the_default_model_has_the_lines_of_its_plan(
    capsys: pytest.CaptureFixture[str], start_server: Callable[..., ServerProcess]
) -> None:
    """A real `octavo serve`, started with the very command that `octavo plan` prints."""
    arguments = ["plan", "--memory", "4GiB", "--context", "2048", "--concurrency", "8"]
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    report = capsys.readouterr().out.splitlines()
    server = start_server(*plan["server"]["command"][2:])
    assert server.url
    for start in ("           LlamaForCausalLM", "  K/V pool ", "  limits   "):
        (said,) = [line for line in server.lines if line.startswith(start)]
        assert said in report
    assert not any(line.startswith("  note ") for line in server.lines)
    status, text = server.get("/v1/models")
    assert status == 200
    assert json.loads(text)["data"][0]["max_model_len"] == plan["server"]["max_model_len"] == 2048
    assert f"octavo {' '.join(plan['server']['command'][1:])}" in "\n".join(report)


@pytest.mark.real_model
@pytest.mark.parametrize("settings", [{"dtype": "float32"}, {"dtype": "bfloat16", "block_size": "16"}])
def test_the_default_models_engine_says_what_was_planned(settings: dict[str, str]) -> None:
    expected, command = planned(None, device="cpu", kv_cache_memory="64MiB", **settings)
    from octavo.model.weights.resolve import resolve_model

    ready = started([str(resolve_model(None).path), *command])
    assert msgspec.structs.replace(ready, phases={}) == msgspec.structs.replace(expected, notes=[])
