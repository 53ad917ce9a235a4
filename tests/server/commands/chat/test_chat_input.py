"""What is typed, what it means, and what reaches the terminal: pure functions."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from octavo.model.text import one_line, printable, without_surrogates
from octavo.server.terminal.commands import (
    COMMANDS,
    NAMES,
    SETTINGS,
    Command,
    CommandError,
    describe_settings,
    parse_input,
    parse_setting,
)
from octavo.server.terminal.input import Entry, History, LineAssembler, history_path


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("hello", "hello"),
        ("/new", Command("new")),
        ("/NEW ", Command("new")),
        ("/exit", Command("quit")),
        ("/system Be brief.\nVery.", Command("system", "Be brief.\nVery.")),
        ("/set temperature 0.3", Command("set", "temperature 0.3")),
        (" /new", " /new"),
        ("/etc/passwd is what?", "/etc/passwd is what?"),
        ("/2 is a half", "/2 is a half"),
        ("", ""),
    ],
)
def test_commands_are_told_from_messages(text: str, meaning: Command | str) -> None:
    assert parse_input(text) == meaning


@pytest.mark.parametrize(
    ("text", "hint"),
    [("/hlep", "did you mean /help?"), ("/xyzzy", "/help lists them"), ("/", "/help"), ("/new topic", "takes nothing")],
)
def test_a_mistaken_command_is_one_line(text: str, hint: str) -> None:
    with pytest.raises(CommandError) as caught:
        parse_input(text)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_command_is_known_by_its_name() -> None:
    assert len(NAMES) == len(COMMANDS)
    for name in NAMES:
        assert parse_input(f"/{name}") == Command(name)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("temperature 0.3", 0.3),
        ("temperature=0.3", 0.3),
        ("top_k = 40", 40),
        ("max_tokens 64", 64),
        ("seed default", None),
        ("stop END", ["END"]),
        (r'stop "\n\n" "User:" END', ["\n\n", "User:", "END"]),
    ],
)
def test_settings_are_parsed(text: str, value: object) -> None:
    setting = parse_setting(text)
    assert setting.value == value
    assert setting.name in SETTINGS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("temprature 1", "did you mean temperature?"),
        ("colour red", "known: temperature, top_p"),
        ("temperature", "needs a value"),
        ("temperature=", "needs a value"),
        ("temperature hot", "expected a number"),
        ("temperature nan", "expected a finite number"),
        ("max_tokens 1.5", "expected a whole number"),
        (r'stop "\q"', "double quotes"),
        ('stop ""', "none of them empty"),
    ],
)
def test_a_mistaken_setting_is_one_line(text: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        parse_setting(text)


def test_all_settings_are_shown_with_what_is_set() -> None:
    lines = describe_settings({"stop": ["\n"], "top_p": 0.9})
    assert [line.split()[0] for line in lines] == list(SETTINGS)
    shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert shown["stop"] == r'["\n"]'
    assert shown["top_p"] == "0.9"
    assert shown["seed"] == "(the server decides)"


def entries(*lines: str) -> list[Entry]:
    assembler = LineAssembler()
    found = [assembler.feed(line) for line in lines]
    return [entry for entry in (*found, assembler.finish()) if entry is not None]


def test_lines_are_put_together() -> None:
    assert entries("one", "two") == [Entry("one"), Entry("two")]
    assert entries("one \\", "two\\", "three", "four") == [Entry("one \ntwo\nthree"), Entry("four")]
    assert entries('"""', "def f():", "    return 1\\", '"""', "next") == [
        Entry("def f():\n    return 1\\", is_block=True),
        Entry("next"),
    ]
    assert entries('"""/new"""') == [Entry("/new", is_block=True)]
    assert entries('"""first', 'last"""') == [Entry("first\nlast", is_block=True)]
    assert entries("cut off\\") == [Entry("cut off")]
    assert entries('"""', "cut off") == [Entry("cut off", is_block=True)]


def test_what_a_terminal_would_act_on_is_stripped() -> None:
    hostile = "\x1b]0;owned\x07a\x1b[31mb\x9b2Jc\rd\be\x7f\x00\tf\n\x85\ud800ü€😀"
    shown = printable(hostile)
    assert shown == "]0;owneda[31mb2Jcde\tf\n\ufffdü€😀"
    shown.encode("utf-8")
    assert one_line("a\n b\x1b\t c " + "x" * 1000) == "a b c " + "x" * 493 + "…"
    assert without_surrogates("a\udcffb") == "a?b"


def test_the_history_lies_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_path({"XDG_STATE_HOME": "/state"}) == Path("/state/octavo/chat_history")
    for environ in ({}, {"XDG_STATE_HOME": ""}, {"XDG_STATE_HOME": "relative"}):
        assert history_path(environ) == tmp_path / ".local/state/octavo/chat_history"


def test_only_its_owner_may_read_the_history(tmp_path: Path) -> None:
    readline = pytest.importorskip("readline")
    path = tmp_path / "state" / "chat_history"
    path.parent.mkdir()
    path.write_text("_HiStOrY_V2_\nearlier\n" if "libedit" in (readline.__doc__ or "") else "earlier\n")
    path.chmod(0o644)
    readline.clear_history()
    try:
        history = History(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert readline.get_history_item(1) == "earlier"
        readline.add_history("now")
        history.save()
        history.save()
        assert path.read_text().splitlines()[-2:] == ["earlier", "now"]
    finally:
        readline.clear_history()


def test_importing_the_command_does_not_import_the_network() -> None:
    heavy = ("aiohttp", "rich", "readline", "torch")
    code = f"import sys, octavo.server.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
