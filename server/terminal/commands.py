"""What a line of the chat means: a message to the model, or a /command. Pure functions, no terminal."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

SettingValue: TypeAlias = "float | int | list[str]"

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "/help": "this list",
        "/new": "forget the conversation; the system prompt and the settings stay",
        "/system TEXT": "set the system prompt; alone: show it; `none` removes it",
        "/set NAME VALUE": "a sampling setting; VALUE `default` leaves it to the server; alone: show all",
        "/retry": "answer the last question again",
        "/undo": "take back the last question and its answer",
        "/save FILE": "write the conversation as JSON messages",
        "/load FILE": "continue a conversation from such a file",
        "/model NAME": "talk to another model of the server; alone: list them",
        "/stats": "tokens, time to the first token, speed and cached tokens of the last answer",
        "/quit": "leave, as Ctrl-D does",
    }
)
"""Usage → what it does."""
NAMES = tuple(usage.split()[0][1:] for usage in COMMANDS)
_WITH_ARGUMENT = {usage.split()[0][1:] for usage in COMMANDS if " " in usage}
_ALIASES = {"exit": "quit"}
_MAX_STOPS = 16

_QUOTED_OR_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\S+')


class CommandError(ValueError):
    """A command that cannot be carried out. One line, fit for the user."""


@dataclass(frozen=True, slots=True)
class Command:
    name: str
    """One of NAMES."""
    argument: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    name: str
    value: SettingValue | None
    """None: back to the server's default."""


def parse_input(text: str) -> Command | str:
    """A command, or the message itself. Raises CommandError for an unknown command, with the nearest known one.

    Only a first word of a slash and letters is taken for a command; a message that begins so is sent by putting a
    space before it.
    """
    match = re.match(r"/([A-Za-z?]*)(?:\s+|$)", text)
    if match is None:
        return text
    name, argument = match[1].lower(), text[match.end() :].strip()
    name = _ALIASES.get(name, name)
    if name not in NAMES:
        near = difflib.get_close_matches(name, [*NAMES, *_ALIASES], n=1)
        hint = f"did you mean /{near[0]}?" if near else "/help lists them (a space before the / sends it as text)"
        raise CommandError(f"unknown command /{name[:40]}; {hint}")
    if argument and name not in _WITH_ARGUMENT:
        raise CommandError(f"/{name} takes nothing behind it (a space before the / sends it as text)")
    return Command(name, argument)


def parse_setting(text: str) -> Setting:
    """A setting from "temperature 0.3" or "temperature=0.3". Raises CommandError.

    Ranges are the server's to judge: its message is shown if it refuses.
    """
    match = re.fullmatch(r"\s*(\w+)\s*(?:=|\s)\s*(\S.*)", text, re.DOTALL)
    name = match[1] if match else text.split("=")[0].strip()
    if name not in SETTINGS:
        near = difflib.get_close_matches(name, SETTINGS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(SETTINGS)}"
        raise CommandError(f"unknown setting {name[:40]!r}; {hint}")
    if match is None:
        raise CommandError(f"{name} needs a value, such as {_EXAMPLES[name]}; `default` leaves it to the server")
    value = match[2].strip()
    if value == "default":
        return Setting(name, None)
    try:
        return Setting(name, SETTINGS[name](value))
    except ValueError as error:
        raise CommandError(f"{name}: {error} (given: {value[:40]!r})") from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("expected a number") from None
    if not math.isfinite(value):
        raise ValueError("expected a finite number")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("expected a whole number") from None


def _stops(text: str) -> list[str]:
    r"""Words, or strings in double quotes with JSON's escapes: `"\n" "User:"`."""
    stops: list[str] = []
    for item in _QUOTED_OR_WORD.findall(text):
        try:
            stops.append(json.loads(item) if item.startswith('"') else item)
        except ValueError:
            raise ValueError("expected words, or strings in double quotes") from None
    if len(stops) > _MAX_STOPS or "" in stops:
        raise ValueError(f"expected 1 to {_MAX_STOPS} strings, none of them empty")
    return stops


SETTINGS: Mapping[str, Callable[[str], SettingValue]] = MappingProxyType(
    {
        "temperature": _number,
        "top_p": _number,
        "top_k": _integer,
        "min_p": _number,
        "max_tokens": _integer,
        "seed": _integer,
        "stop": _stops,
        "presence_penalty": _number,
        "frequency_penalty": _number,
        "repetition_penalty": _number,
    }
)
"""Name, as the API has it → parser of its value."""
_EXAMPLES = {name: "0.3" if parse is _number else "64" for name, parse in SETTINGS.items()} | {"stop": '"\\n"'}


def describe_settings(settings: Mapping[str, SettingValue]) -> list[str]:
    """One line for each known setting."""
    shown = {name: json.dumps(settings[name], ensure_ascii=False) for name in SETTINGS if name in settings}
    width = max(map(len, SETTINGS))
    return [f"{name:{width}}  {shown.get(name, '(the server decides)')}" for name in SETTINGS]


def describe_commands() -> list[str]:
    width = max(map(len, COMMANDS))
    return [f"{usage:{width}}  {text}" for usage, text in COMMANDS.items()]
