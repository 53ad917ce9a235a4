"""`octavo chat`: talk to a running server from the terminal."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..client_address import DEFAULT_BASE_URL, checked_address, find_key, with_version
from ..options import OptionError

if TYPE_CHECKING:
    from ..terminal.commands import SettingValue
    from . import Subcommands


def add_parser(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk to a running server from the terminal",
        description="Talk to a running server: this one or any other with the OpenAI API. With a QUESTION, or with "
        "text on standard input, prints the answer and nothing else; otherwise a session begins, where /help lists "
        "the commands.",
    )
    parser.add_argument("question", nargs="*", metavar="QUESTION", help="ask this; piped text is put below it")
    parser.add_argument("--base-url", metavar="URL", help=f"the server (default: {DEFAULT_BASE_URL}) [OCTAVO_BASE_URL]")
    parser.add_argument(
        "--api-key", metavar="KEY", help="the server's key, where it wants one [OCTAVO_API_KEY, OPENAI_API_KEY]"
    )
    parser.add_argument("--model", metavar="NAME", help="one of the server's models (default: its first)")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a sampling setting, such as temperature=0.3 or max_tokens=200; may be repeated",
    )
    parser.add_argument("--no-history", action="store_true", help="do not keep what is typed for the next session")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    base_url = _base_url(arguments.base_url, os.environ)
    api_key = find_key(arguments.api_key, os.environ)
    settings = _settings(arguments.set)
    is_session = not arguments.question and sys.stdin is not None and sys.stdin.isatty()
    question = "" if is_session else _question(arguments.question)

    from ..terminal.chat import Chat, chat_interactively, chat_once, open_history
    from ..terminal.screen import Screen, wants_color

    chat = Chat(base_url, api_key, model=arguments.model, system=arguments.system, settings=settings)
    try:
        if not is_session:
            return chat_once(chat, question)
        screen = Screen(color=wants_color())
        history = None if arguments.no_history else open_history(dict(os.environ), screen)
        return chat_interactively(chat, screen, history)
    finally:
        chat.close()


def _base_url(given: str | None, environ: Mapping[str, str]) -> str:
    """With the API's version. Raises OptionError."""
    if given is not None:
        return with_version(checked_address("--base-url", given))
    return with_version(checked_address("OCTAVO_BASE_URL", environ.get("OCTAVO_BASE_URL") or DEFAULT_BASE_URL))


def _settings(given: list[str]) -> dict[str, SettingValue]:
    if not given:
        return {}
    from ..terminal.commands import CommandError, parse_setting

    settings: dict[str, SettingValue] = {}
    for text in given:
        try:
            setting = parse_setting(text)
        except CommandError as error:
            raise OptionError(f"--set: {error}") from None
        if setting.value is not None:
            settings[setting.name] = setting.value
    return settings


def _question(words: list[str]) -> str:
    """From the command line, with what is piped in below it. Raises OptionError where there is none."""
    from ...model.text import without_surrogates

    parts = [without_surrogates(" ".join(words))]
    # Beside a question, only what surely ends is read: a pipe or a file, not an inherited socket or terminal.
    if sys.stdin is not None:  # None: it was closed before the start
        mode = os.fstat(sys.stdin.fileno()).st_mode
        if not words or stat.S_ISFIFO(mode) or stat.S_ISREG(mode):
            parts.append(sys.stdin.buffer.read().decode("utf-8", "replace"))
    question = "\n\n".join(part.strip("\n") for part in parts if part.strip())
    if not question:
        raise OptionError("there is nothing to ask: give a question, or text on standard input")
    return question
