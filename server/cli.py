"""The `octavo` command: finds the subcommand and turns its errors into one line and an exit status."""

from __future__ import annotations

import argparse
import os
import select
import sys
from importlib.metadata import version

from ..model.spec import ModelError
from ..model.text import printable
from .commands import bench, chat, plan, pull, serve
from .exit_status import BROKEN_PIPE, INTERRUPTED
from .options import OptionError


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    2: a mistake in the arguments; 1: it could not be done; 130: interrupted; 141: nobody reads the output any more.
    """
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a reader that has left can still be told from a failure
        return status
    except OptionError as error:
        return _fail(str(error), 2)
    except ModelError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        if not _reader_has_left():
            raise
        return BROKEN_PIPE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="octavo", description="A small, readable, honest inference server for language models."
    )
    parser.add_argument("--version", action="version", version=f"octavo {version('octavo')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (serve, chat, plan, bench, pull):
        command.add_parser(commands)
    return parser


def _reader_has_left() -> bool:
    """Whether standard output is what broke. Then it is turned away, for Python flushes it once more at its end."""
    if sys.stdout is None:
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # that it is broken is told unasked
    has_left = any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    if has_left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return has_left


def _fail(message: str, status: int) -> int:
    print(f"octavo: {printable(message)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
