"""The `octavo` command: finds the subcommand and turns its errors into one line and an exit status."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version

from ..model.spec import ModelError
from .commands import bench, chat, plan, pull, serve
from .options import OptionError

INTERRUPTED = 130
"""As a shell reports a program that SIGINT ended."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    2: a mistake in the arguments; 1: it could not be done; 130: interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except OptionError as error:
        return _fail(str(error), 2)
    except ModelError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="octavo", description="A small, readable, honest inference server for language models."
    )
    parser.add_argument("--version", action="version", version=f"octavo {version('octavo')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (serve, chat, plan, bench, pull):
        command.add_parser(commands)
    return parser


def _fail(message: str, status: int) -> int:
    print(f"octavo: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
