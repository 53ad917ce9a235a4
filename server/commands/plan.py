"""`octavo plan`: what a model needs and what fits, from its header alone."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..options import ENV_PREFIX, OPTIONS, OptionError, add_group, given, parse_size, resolve_options

if TYPE_CHECKING:
    import torch

    from ...model.plan import PlanRequest
    from ...model.spec import ModelSpec
    from . import Subcommands

_SERVER_OPTIONS = (
    "device",
    "model_impl",
    "dtype",
    "block_size",
    "kv_cache_memory",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kernel_backend",
    "config",
)
"""Those of `octavo serve` that the numbers depend on: the same flags, environment variables and config file."""
_BY_NAME = {option.name: option for option in OPTIONS}


def add_parser(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "plan",
        help="what a model needs in memory, and what fits, before anything is loaded",
        description="Weights, K/V cache, contexts and concurrency of a model, from its config.json or GGUF header "
        "alone: no weight is read or downloaded. The numbers are those that `octavo serve` prints at its start.",
    )
    parser.add_argument(
        "model_positional",
        nargs="?",
        metavar="MODEL",
        help="whatever `octavo serve` takes, or a config.json without weights; default: the default model "
        f"[{ENV_PREFIX}MODEL]",
    )
    own = parser.add_argument_group("questions")
    own.add_argument(
        "--memory", metavar="SIZE", help="memory free before the start, such as 24GiB; default: this machine's"
    )
    own.add_argument("--context", metavar="TOKENS", help="how many sequences of this length fit at once?")
    own.add_argument("--concurrency", metavar="N", help="how long may so many sequences be at once? (default: 1)")
    own.add_argument("--json", action="store_true", help="print everything as JSON")
    add_group(parser, "settings of the server that is planned", _SERVER_OPTIONS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    settings = given(arguments, _SERVER_OPTIONS)
    if arguments.model_positional is not None:
        settings["model"] = arguments.model_positional
    memory = _parsed("--memory", arguments.memory, parse_size)
    context = _parsed("--context", arguments.context, _BY_NAME["max_model_len"].parse)
    concurrency = _parsed("--concurrency", arguments.concurrency, _BY_NAME["max_num_seqs"].parse)
    values = resolve_options(settings)
    # The question is the setting where no setting is given beside it.
    if context is not None and "max_model_len" not in settings:
        values["max_model_len"] = context
    if concurrency is not None and "max_num_seqs" not in settings:
        values["max_num_seqs"] = concurrency
    _refuse_contradictions(values, context, concurrency)
    return _plan(values, memory, context, concurrency, as_json=arguments.json)


def _parsed(flag: str, text: str | None, parse: Any) -> Any:
    try:
        return None if text is None else parse(text)
    except ValueError as error:
        raise OptionError(f"{flag}: {error} (given: {text[:80]!r})") from None  # type: ignore[index]


def _refuse_contradictions(values: Mapping[str, Any], context: int | None, concurrency: int | None) -> None:
    if context is not None and context > values["max_model_len"]:
        raise OptionError(
            f"--context {context} is longer than --max-model-len {values['max_model_len']}; give one of them"
        )
    if concurrency is not None and concurrency > values["max_num_seqs"]:
        raise OptionError(
            f"--concurrency {concurrency} is more than --max-num-seqs {values['max_num_seqs']}; give one of them"
        )


def _plan(
    values: Mapping[str, Any], memory: int | None, context: int | None, concurrency: int | None, *, as_json: bool
) -> int:
    from ...model.header import read_header
    from ...model.plan import plan_model
    from ..plan_report import print_json, print_report

    _device(values, memory)  # what is wrong with it is said before anything is fetched
    header = read_header(values["model"], values["model_impl"])
    request, notes = plan_request(values, header.spec, memory, context, concurrency)
    plan = plan_model(header, request)
    show = print_json if as_json else print_report
    show(plan, values, notes)
    return 0 if plan.header.refusal is None else 1


def _device(values: Mapping[str, Any], memory: int | None) -> tuple[torch.device, bool]:
    """Which one is planned for, and whether it is absent here. Raises OptionError."""
    import torch

    from ...model.device import resolve_device

    absent = values["device"] == "cuda" and not torch.cuda.is_available()
    if absent and memory is None:
        raise OptionError("--device cuda: this machine has none to look at; give its memory, such as --memory 24GiB")
    return torch.device("cuda") if absent else resolve_device(values["device"]), absent


def plan_request(
    values: Mapping[str, Any], spec: ModelSpec, memory: int | None, context: int | None, concurrency: int | None
) -> tuple[PlanRequest, tuple[str, ...]]:
    """The request, and what a user should know of how it came about. Raises OptionError."""
    import torch

    from ...model.device import resolve_dtype
    from ...model.memory import DEFAULT_BATCHED_TOKENS, FreeMemory, free_memory
    from ...model.plan import PlanRequest

    notes: tuple[str, ...] = ()
    device, absent = _device(values, memory)
    if absent and values["dtype"] == "auto":
        dtype = torch.bfloat16
        notes = ("dtype auto is taken for bfloat16, as on CUDA devices from compute capability 8.0 on",)
    else:
        dtype = resolve_dtype(values["dtype"], device, values["kernel_backend"], spec)
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    free = free_memory(device) if memory is None else FreeMemory(kind, memory, memory)
    request = PlanRequest(
        device=device,
        free=free,
        dtype=dtype,
        kernel_backend=values["kernel_backend"],
        block_size=values["block_size"],
        max_num_seqs=values["max_num_seqs"],
        max_num_batched_tokens=values["max_num_batched_tokens"] or DEFAULT_BATCHED_TOKENS[kind],
        max_model_len=values["max_model_len"],
        kv_cache_memory=values["kv_cache_memory"],
        context=context,
        concurrency=concurrency,
    )
    return request, notes
