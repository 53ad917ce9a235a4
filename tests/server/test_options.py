"""Settings from command line, environment and file, and the command's own mistakes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from octavo.kernels.select import BACKENDS
from octavo.server.cli import main
from octavo.server.options import OPTIONS, OptionError, add_arguments, parse_size, resolve_options, server_config


def resolve(*arguments: str, env: dict[str, str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return resolve_options(vars(parser.parse_args(list(arguments))), env or {})


def test_command_line_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("port: 1\nblock-size: 16\nmax_num_seqs: 3\napi-key: [a, b]\n")
    values = resolve("--config", str(file), "--port", "3", env={"OCTAVO_PORT": "2", "OCTAVO_BLOCK_SIZE": "64"})
    assert (values["port"], values["block_size"], values["max_num_seqs"], values["seed"]) == (3, 64, 3, 0)
    assert values["api_key"] == ("a", "b")
    assert resolve(env={"OCTAVO_CONFIG": str(file)})["port"] == 1


def test_every_option_can_come_from_every_source(tmp_path: Path) -> None:
    examples = {
        "device": "cpu",
        "dtype": "float32",
        "block_size": "16",
        "kernel_backend": "reference",
        "load_format": "dummy",
        "model_impl": "generic",
    }
    examples |= {
        "generation_config": "none",
        "log_level": "debug",
        "enable_prefix_caching": "false",
        "metrics_prefix": "vllm:",
    }
    for option in OPTIONS:
        text = examples.get(option.name, "yes" if option.name == "allow_anonymous" else "7")
        expected = (option.parse(text),) if option.repeated else option.parse(text)
        flag = ["--no-enable-prefix-caching"] if option.name == "enable_prefix_caching" else [option.flag, text]
        if option.name == "allow_anonymous":
            flag = [option.flag]
        file = tmp_path / "one.yaml"
        file.write_text(f"{option.name}: {text!r}\n")
        assert resolve(*flag)[option.name] == expected
        assert resolve(env={option.env: text})[option.name] == expected
        assert resolve("--config", str(file))[option.name] == expected


def test_every_option_reaches_the_configuration() -> None:
    """A setting that is accepted and has no effect would be a lie."""
    changed = {"device": "cpu", "dtype": "float32", "block_size": 16, "kernel_backend": "reference", "model": "m"}
    changed |= {"generation_config": "none", "log_level": "debug", "enable_prefix_caching": False}
    changed |= {"allow_anonymous": True, "host": "127.0.0.2", "metrics_prefix": "x:", "api_key": ("k",)}
    changed |= {"served_model_name": ("s",), "load_format": "dummy", "model_impl": "generic"}
    base = resolve()
    plain = server_config(base, model_path="p", model_name="n")
    for option in OPTIONS:
        if option.name == "model":
            continue
        values = {**base, option.name: changed.get(option.name, 5)}
        if option.name == "host":
            values["allow_anonymous"] = True
            assert server_config(values, model_path="p", model_name="n").host == "127.0.0.2"
            continue
        assert server_config(values, model_path="p", model_name="n") != plain, option.name


def test_two_different_models_are_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "one.gguf", "--model", "another.gguf"]) == 2
    assert capsys.readouterr().err == "octavo: two models are given, one.gguf and --model another.gguf; give one\n"


@pytest.mark.parametrize("name", ["plan", "bench kv-cache", "bench roofline"])
def test_commands_that_take_some_options_describe_them_as_serve_does(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    helps = []
    for command in (name.split(), ["serve"]):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        helps.append([line.split() for line in capsys.readouterr().out.splitlines()])
    some, all_of_them = helps
    shared = [line for line in some if line and line[-1].startswith("[OCTAVO_") and line[0].startswith("--")]
    assert len(shared) >= 4
    assert all(line in all_of_them for line in shared)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1024", 1024), ("1k", 1024), ("2KiB", 2048), ("1.5g", 3 * 2**29), ("8GiB", 2**33), ("1 TB", 2**40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "many", "-1", "1X", "1e9", "nan"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("arguments", "env", "file", "message"),
    [
        (["--port", "99999"], {}, None, "--port: expected a number from 0 to 65535"),
        ([], {"OCTAVO_PORT": "x"}, None, "OCTAVO_PORT: "),
        ([], {}, "port: [1, 2]", "port in "),
        ([], {}, "prot: 1", "unknown settings: prot"),
        ([], {}, "just text", "name: value"),
        ([], {}, "a: [", "not YAML"),
        (["--config", "/nowhere.yaml"], {}, None, "cannot read"),
        (["--metrics-prefix", "a b"], {}, None, "--metrics-prefix"),
    ],
)
def test_mistakes_are_one_line_that_says_where(
    tmp_path: Path, arguments: list[str], env: dict[str, str], file: str | None, message: str
) -> None:
    if file is not None:
        path = tmp_path / "c.yaml"
        path.write_text(file)
        arguments = [*arguments, "--config", str(path)]
    with pytest.raises(OptionError) as error:
        resolve(*arguments, env=env)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_other_machines_need_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5"):
        with pytest.raises(OptionError, match="--api-key"):
            server_config(resolve("--host", host), model_path="p", model_name="n")
        server_config(resolve("--host", host, "--api-key", "k"), model_path="p", model_name="n")
        server_config(resolve("--host", host, "--allow-anonymous"), model_path="p", model_name="n")


def test_a_port_in_use_is_found_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status = main(["serve", "--port", str(taken.getsockname()[1])])
    assert status in (1, 2)
    assert capsys.readouterr().err.count("\n") == 1


def test_every_kernel_backend_can_be_chosen() -> None:
    for name in BACKENDS:
        assert resolve("--kernel-backend", name)["kernel_backend"] == name
