"""`octavo plan` and the start's message for a model without a family of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from generic_models import save_generic
from octavo.model.header import read_header
from octavo.model.plan import plan_model
from octavo.server.cli import _parser, main
from octavo.server.commands.plan import plan_request
from octavo.server.engine.startup import build_engine
from octavo.server.options import resolve_options, server_config
from octavo.server.plan_report import expected_ready, serve_command


def planned(model: str, **settings: str) -> tuple[Any, list[str]]:
    values = resolve_options({**settings, "model": model}, {})
    header = read_header(model, values["model_impl"])
    request, _ = plan_request(values, header.spec, memory=2**32, context=None, concurrency=None)
    plan = plan_model(header, request)
    return expected_ready(plan, values), serve_command(plan, values)[2:]


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("gpt neox", {"dtype": "float32"}),
        ("cohere2", {"dtype": "bfloat16", "block_size": "16"}),
        ("deepseek v3", {"dtype": "float32", "kv_cache_memory": "1MiB", "max_num_seqs": "2"}),
    ],
)
def test_an_engine_started_as_printed_says_what_was_planned(
    tmp_path: Path, case: str, settings: dict[str, str]
) -> None:
    save_generic(case, tmp_path)
    expected, command = planned(str(tmp_path), device="cpu", **settings)
    given = dict(vars(_parser().parse_args(["serve", *command])))
    given["model"] = given.pop("model_positional")
    config = server_config(resolve_options(given, {}), model_path=given["model"], model_name="m")
    _, ready = build_engine(config.engine)
    notes = [note for note in expected.notes if "limited to" not in note]  # the command has the fitted context
    assert notes[0].startswith("the generic path serves: ")
    assert msgspec.structs.replace(ready, phases={}) == msgspec.structs.replace(expected, notes=notes)
    assert "has no native family, so transformers' own code computes it" in notes[0]


def test_a_config_alone_can_be_planned(tmp_path: Path) -> None:
    save_generic("gpt neox", tmp_path / "whole")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    whole, bare = (read_header(str(tmp_path / name)) for name in ("whole", "bare"))
    assert bare.num_parameters == whole.num_parameters
    assert (bare.kv_layout, bare.refusal) == (whole.kv_layout, None)


def test_the_command_says_who_computes_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_generic("olmo", tmp_path)
    arguments = ["plan", str(tmp_path), "--memory", "4GiB", "--device", "cpu", "--model-impl", "generic"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "  note     the generic path serves: OlmoForCausalLM has no native family, so transformers' own code" in text
    assert "--model-impl generic" in text
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert "generic" in plan["server"]["command"]


def test_a_model_that_no_path_serves_is_planned_and_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_generic("gpt neox", tmp_path)
    assert main(["plan", str(tmp_path), "--memory", "4GiB", "--device", "cpu", "--model-impl", "native"]) == 1
    assert "GPTNeoXForCausalLM is not supported" in capsys.readouterr().out


def test_a_roofline_of_code_that_is_not_ours_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_generic("gpt neox", tmp_path)
    assert main(["bench", "roofline", "--model", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "GPTNeoXForCausalLM has no native family, and a roofline counts" in error
    assert error.count("\n") == 1
