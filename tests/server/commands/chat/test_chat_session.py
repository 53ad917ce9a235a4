"""The chat against a scripted server: at a terminal, and from a script."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_server import COMMAND, FakeChatServer, Terminal, breaks_after, never_ends, refuses, says


def octavo(
    *arguments: str, env: dict[str, str], given: bytes | None = None, **changes: str
) -> subprocess.CompletedProcess[bytes]:
    """`octavo chat` from a script; `given` is piped in."""
    return subprocess.run(
        [COMMAND, "chat", *arguments],
        input=given,
        stdin=subprocess.DEVNULL if given is None else None,
        capture_output=True,
        env=env | changes,
        timeout=120,
        check=False,
    )


def contents(request: dict[str, object]) -> list[str]:
    messages = request["messages"]
    assert isinstance(messages, list)
    return [message["content"] for message in messages]


def test_a_piped_question_gets_the_answer_and_nothing_else(server: FakeChatServer, env: dict[str, str]) -> None:
    server.replies = [says("\x1b[31mGrüße", " back")]
    done = octavo("--system", "Be brief.", "--set", "temperature=0.5", "--set", 'stop="a"', env=env, given=b"hi\n")
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, "[31mGrüße back\n", b"")
    assert server.requests == [
        {
            "model": "tiny",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
            "temperature": 0.5,
            "stop": ["a"],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert server.keys == [None, None]


def test_a_question_as_argument_goes_above_what_is_piped(server: FakeChatServer, env: dict[str, str]) -> None:
    arguments = ("--model", "other", "Summarise", "this:")
    done = octavo(*arguments, env=env, given=b"line 1\nline 2\n", OCTAVO_API_KEY="k1,k2")
    assert done.returncode == 0
    assert server.requests[0]["model"] == "other"
    assert contents(server.requests[0]) == ["Summarise this:\n\nline 1\nline 2"]
    assert server.keys == ["Bearer k1"]
    assert octavo("alone", env=env).stdout == b"Hello\n"
    assert contents(server.requests[1]) == ["alone"]


def test_an_answer_that_was_cut_off_says_so_beside_it(server: FakeChatServer, env: dict[str, str]) -> None:
    server.replies = [says("Once upon", finish="length")]
    done = octavo("tell", env=env)
    assert (done.returncode, done.stdout) == (0, b"Once upon\n")
    assert b"cut off at its limit of tokens" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is nothing to ask"),
        (("--base-url", "localhost:8000", "hi"), "--base-url: expected an address"),
        (("--set", "temprature=1", "hi"), "--set: unknown setting 'temprature'; did you mean temperature?"),
        (("--api-key", "a\nb", "hi"), "--api-key: a key consists of visible ASCII"),
        (("--base-url", "http://me:secret@host", "hi"), "--base-url: expected an address without user name"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    env: dict[str, str], arguments: tuple[str, ...], message: str
) -> None:
    done = octavo(*arguments, env=env)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().startswith(f"octavo: {message}")
    assert done.stderr.count(b"\n") == 1


def test_without_a_server_it_says_how_to_start_one(env: dict[str, str]) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else can answer there
        taken.bind(("127.0.0.1", 0))
        done = octavo("hi", env=env, OCTAVO_BASE_URL=f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"no server answers at http://127.0.0.1:" in done.stderr
    assert b"start one with `octavo serve`" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_failures_keep_what_had_arrived_and_end_with_status_1(server: FakeChatServer, env: dict[str, str]) -> None:
    for reply, out, message in [
        (breaks_after("Half", "the engine died"), b"Half\n", "the engine died"),
        (breaks_after("Half"), b"Half\n", "ended the answer before it was finished"),
        (never_ends("Half"), b"Half\n", "sends an event that does not end"),
        (refuses(401, "Wrong key."), b"", "Wrong key. (give the key with"),
    ]:
        server.replies = [reply]
        done = octavo("hi", env=env)
        assert (done.returncode, done.stdout) == (1, out)
        assert message in done.stderr.decode()
        assert done.stderr.count(b"\n") == 1


def test_a_list_without_a_usable_name_offers_no_model(server: FakeChatServer, env: dict[str, str]) -> None:
    server.models = [None]
    done = octavo("hi", env=env)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"offers no model; name one with --model" in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(("question", "status", "out"), [("hi", 0, b"Hello\n"), ("", 2, b"")])
def test_a_closed_standard_input_is_no_input(
    server: FakeChatServer, env: dict[str, str], question: str, status: int, out: bytes
) -> None:
    script = f'exec "$0" chat {question} <&-'
    done = subprocess.run(["sh", "-c", script, COMMAND], capture_output=True, env=env, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (status, out)
    assert b"Traceback" not in done.stderr


def test_a_reader_that_leaves_ends_it_quietly(server: FakeChatServer, env: dict[str, str]) -> None:
    server.replies = [says(*["many words "] * 2000)]
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [COMMAND, "chat", "hi"], env=env, stdout=writing, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (141, b"")


def test_a_session_at_a_terminal(
    server: FakeChatServer, env: dict[str, str], terminal: Callable[..., Terminal]
) -> None:
    server.replies = [
        says("I am ", "tiny."),
        server.hangs_after("An endless"),
        says("Again."),
        says("You said so."),
    ]
    at = terminal("chat")
    at.expect(r"tiny at http://\S+/v1 · /help")
    at.expect("> ")
    at.send("Who are you?\n")
    at.expect(r"I am tiny\.\r\n")
    at.expect("> ")

    at.send("/stats\n")
    at.expect("prompt +7 tokens, 3 of them from the prefix cache")
    at.expect("answer +5 tokens")
    at.expect("first token +[0-9.]+ s")
    at.expect("> ")

    # Ctrl-C stops the answer, and the server notices.
    at.send("Tell me a story\n")
    at.expect("An endless")
    at.send("\x03")
    at.expect(r"\[stopped\]")
    assert server.left.wait(60)
    at.expect("> ")

    # The partial answer is part of the conversation, until /retry replaces it.
    at.send("/retry\n")
    at.expect(r"Again\.")
    at.expect("> ")
    assert contents(server.requests[2]) == ["Who are you?", "I am tiny.", "Tell me a story"]

    # Ctrl-C at the prompt clears the line.
    at.send("never sent\x03")
    at.expect("> ")
    at.send("one \\\n")
    at.expect(r"\. ")
    at.send("two\n")
    at.expect(r"You said so\.")
    at.expect("> ")
    assert contents(server.requests[3])[-1] == "one \ntwo"

    at.send("/hlep\n")
    at.expect(r"! unknown command /hlep; did you mean /help\?")
    at.expect("> ")
    at.send("\x04")
    assert at.wait() == 0
    history = Path(env["XDG_STATE_HOME"], "octavo", "chat_history").read_text()
    assert "Tell me a story" in history
    assert "never sent" not in history


def test_a_later_session_remembers_what_was_typed(
    server: FakeChatServer, env: dict[str, str], terminal: Callable[..., Terminal]
) -> None:
    path = Path(env["XDG_STATE_HOME"], "octavo", "chat_history")
    path.parent.mkdir(parents=True)
    path.write_text("asked yesterday\n")
    at = terminal("chat", TERM="xterm")
    at.expect("lists the commands")
    at.expect("> ")
    at.send("\x1b[A\n")
    at.expect("Hello")
    at.expect("> ")
    at.send("/quit\n")
    assert at.wait() == 0
    assert contents(server.requests[0]) == ["asked yesterday"]

    at = terminal("chat", "--no-history")
    at.expect("> ")
    at.send("a secret\n")
    at.expect("Hello")
    at.expect("> ")
    at.send("\x04")
    assert at.wait() == 0
    assert "a secret" not in path.read_text()


def test_a_history_that_is_gone_costs_a_note_and_not_the_conversation(
    server: FakeChatServer, env: dict[str, str], terminal: Callable[..., Terminal]
) -> None:
    at = terminal("chat")
    at.expect("> ")
    shutil.rmtree(Path(env["XDG_STATE_HOME"], "octavo"))
    at.send("one\n")
    at.expect(r"what is typed is not kept for the next time: No such file or directory")
    at.expect("Hello")
    at.expect("> ")
    at.send("two\n")
    at.expect("Hello")
    at.expect("> ")
    at.send("\x04")
    assert at.wait() == 0
    assert at.output.count("is not kept") == 1
    assert contents(server.requests[1]) == ["one", "Hello", "two"]


def test_failures_leave_the_session_and_its_history_as_they_were(
    server: FakeChatServer, terminal: Callable[..., Terminal]
) -> None:
    server.replies = [
        says("First."),
        refuses(400, "top_p must be at most 1"),
        refuses(400, "This model's maximum context length is 512 tokens", "context_length_exceeded"),
        breaks_after("Half an", "the engine died"),
        says("Whole."),
        refuses(503, "The server is shutting down."),
        says("Recovered."),
    ]
    at = terminal("chat")
    at.expect("> ")
    for text, shown in [
        ("one", r"First\."),
        ("/set top_p 2", r"top_p +2\.0"),
        ("two", r"! top_p must be at most 1; /retry asks again"),
        ("/set top_p default", "the server decides"),
        ("/retry", "! This model's maximum context length .* /new starts over"),
        ("/retry", "Half an\r\n! the engine died; /retry"),
        ("/retry", r"Whole\."),
        ("/retry", r"! The server is shutting down\."),
        ("three", r"Recovered\."),
    ]:
        at.send(text + "\n")
        at.expect(shown)
        at.expect("> ")
    assert contents(server.requests[2]) == ["one", "First.", "two"]
    assert contents(server.requests[4]) == ["one", "First.", "two"]
    # A failed /retry has not cost the answer that was there.
    assert contents(server.requests[6]) == ["one", "First.", "two", "Whole.", "three"]
    assert "top_p" in server.requests[1]
    assert "top_p" not in server.requests[2]
    server.stop()
    at.send("four\n")
    at.expect("! (no server answers at|the connection to) .*; /retry asks again")
    at.expect("> ")
    at.send("\x04")
    assert at.wait() == 0


def test_commands_that_change_the_conversation(
    server: FakeChatServer, terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    path = tmp_path / "chat.json"
    at = terminal("chat")
    at.expect("> ")
    for text, shown in [
        ("/system Be brief.", r"system prompt: Be brief\."),
        ("one", "Hello"),
        (f"/save {path}", "3 messages in"),
        ("two", "Hello"),
        ("/undo", "taken back: two"),
        (f"/save {path}", "3 messages in"),
        ("/new", "a new conversation"),
        ("/undo", "! there is nothing to take back"),
        ("/retry", "! there is no question yet"),
        ("three", "Hello"),
        (f"/load {path}", "3 messages from"),
        ("/model", r"\* tiny\r\n  other"),
        ("/model othr", r"! the server has no model 'othr'; did you mean other\?"),
        ("/model other", r"\* other"),
        ("/system none", r"system prompt: \(none\)"),
        ("/set", r"temperature +\(the server decides\)"),
        ("four", "Hello"),
        ("/save", "! /save needs a file name"),
        ("/save /", "! / exists; name another"),
        ("/help", "/quit +leave"),
    ]:
        at.send(text + "\n")
        at.expect(shown)
        at.expect("> ")
    assert contents(server.requests[2]) == ["Be brief.", "three"]
    assert contents(server.requests[3]) == ["one", "Hello", "four"]
    assert server.requests[3]["model"] == "other"
    assert [message["role"] for message in json.loads(path.read_text())] == ["system", "user", "assistant"]
    at.send("/quit\n")
    assert at.wait() == 0


def test_a_session_without_a_server_ends_with_one_line(
    server: FakeChatServer, terminal: Callable[..., Terminal]
) -> None:
    server.stop()
    at = terminal("chat")
    assert at.wait() == 1
    assert "start one with `octavo serve`" in at.output
    assert at.output.count("\n") == 1
