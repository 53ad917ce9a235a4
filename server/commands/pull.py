"""`octavo pull`: bring a model to this machine and check it, before a server needs it."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import Subcommands


def add_parser(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "pull",
        help="fetch a model and check it",
        description="Fetch a model into the Hugging Face hub's cache, check it, and say where it lies. What is there "
        "already is not fetched again.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a hub id (org/name, org/name@revision, org/name:file.gguf), or a path, which is only checked; default: "
        "the model that `octavo serve` serves by default [OCTAVO_MODEL]",
    )
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="hash whole files and compare (default: those just fetched, and the default model)",
    )
    parser.add_argument(
        "--offline", action="store_true", help="ask no hub, only check what the cache holds [HF_HUB_OFFLINE]"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which is later

    from ..pull import pull_model, report

    name = arguments.model if arguments.model is not None else os.environ.get("OCTAVO_MODEL", "").strip() or None
    try:
        print(report(pull_model(name, verify=arguments.verify), name))
    except KeyboardInterrupt:
        print("octavo: stopped; files that are complete are kept, pull again for the others", file=sys.stderr)
        raise
    return 0
