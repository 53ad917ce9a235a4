"""The chat in a terminal: one question from a script, or a session with /commands.

The terminal is read and written synchronously; only an answer, while it arrives, runs on the event loop. There
Ctrl-C cancels it, and closing its connection makes the server stop.
"""

from __future__ import annotations

import asyncio
import difflib
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

from ...model.text import one_line
from ..exit_status import INTERRUPTED
from .client import ChatClient, Piece, ServerError
from .commands import (
    Command,
    CommandError,
    SettingValue,
    describe_commands,
    describe_settings,
    parse_input,
    parse_setting,
)
from .conversation import Answer, Conversation, ConversationError
from .input import History, enable_completion, history_path, read_entry
from .screen import Screen


class Chat:
    """A conversation with one server. Owns an event loop and a client; `close` gives both back."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None,
        *,
        model: str | None,
        system: str | None,
        settings: dict[str, SettingValue],
    ) -> None:
        """model None: the server's first; looked up by `choose_model`."""
        self.base_url = base_url
        self.model = model
        self.settings = settings
        self.conversation = Conversation(system)
        self.last: Answer | None = None
        self._runner = asyncio.Runner()
        self._client = self._runner.run(_make_client(base_url, api_key))

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()

    def models(self) -> list[str]:
        """Raises ServerError."""
        return self._runner.run(self._client.models())

    def choose_model(self) -> None:
        """Settle on a model where none was named. Raises ServerError."""
        if self.model is None:
            self.model = self.models()[0]

    def ask(self, question: str, show: Callable[[Piece], None]) -> Answer:
        """Add a question and its answer to the conversation; `show` gets the pieces as they arrive.

        Ctrl-C stops the answer: what had arrived is kept, and the answer says that it was stopped. Raises
        ServerError; what had arrived before is kept then too. A question without any answer is not added, but left
        as the conversation's `unanswered`.
        """
        answer = Answer(asked_at=time.monotonic())
        self.last = answer
        body = {"model": self.model, "messages": self.conversation.request_messages(question), **self.settings}
        try:
            self._runner.run(_receive(self._client.answer(body), answer, show))
        except KeyboardInterrupt:  # a second Ctrl-C, while the first one still closes the connection
            answer.stopped = True
        except ServerError:
            answer.stopped = True
            raise
        finally:
            if answer.text or not answer.stopped:
                self.conversation.add(question, answer.text, stopped=answer.stopped)
            else:
                self.conversation.unanswered = question
        return answer


async def _make_client(base_url: str, api_key: str | None) -> ChatClient:
    return ChatClient(base_url, api_key)


async def _receive(stream: AsyncGenerator[Piece, None], answer: Answer, show: Callable[[Piece], None]) -> None:
    try:
        async with aclosing(stream) as pieces:
            async for piece in pieces:
                if piece.text or piece.reasoning:
                    answer.arrived(time.monotonic())
                answer.text += piece.text
                answer.finish_reason = piece.finish_reason or answer.finish_reason
                answer.usage = piece.usage or answer.usage
                show(piece)
    except asyncio.CancelledError:
        # Not passed on: asyncio.Runner cancels its main task for Ctrl-C, and there is nothing else that would.
        answer.stopped = True


def chat_once(chat: Chat, question: str) -> int:
    """Answer one question on standard output, and nothing else there. Returns the exit status."""
    screen = Screen(color=False)
    try:
        chat.choose_model()
        answer = chat.ask(question, lambda piece: screen.answer(piece.text))
    except ServerError as error:
        screen.end_line()
        print(f"octavo: {error}", file=sys.stderr)
        return 1
    screen.end_line()
    if answer.stopped:
        return INTERRUPTED
    if answer.finish_reason == "length":
        print("octavo: the answer was cut off at its limit of tokens (--set max_tokens=N)", file=sys.stderr)
    return 0


class Session:
    """A chat at the keyboard."""

    def __init__(self, chat: Chat, screen: Screen) -> None:
        self._chat = chat
        self._screen = screen
        self._own_files: set[Path] = set()
        self._commands: dict[str, Callable[[str], None]] = {
            "help": self._help,
            "new": self._new,
            "system": self._system,
            "set": self._set,
            "retry": self._retry,
            "undo": self._undo,
            "save": self._save,
            "load": self._load,
            "model": self._model,
            "stats": self._stats,
        }

    def handle(self, entered: Command | str) -> bool:
        """Carry out a command, or send a message; False to leave. Raises nothing that a user can cause."""
        try:
            if isinstance(entered, Command):
                if entered.name == "quit":
                    return False
                self._commands[entered.name](entered.argument)
            elif entered.strip():
                self._ask(entered)
        except (CommandError, ConversationError, ServerError) as error:
            self._screen.error(str(error))
        return True

    def _ask(self, question: str) -> None:
        thinking = False

        def show(piece: Piece) -> None:
            nonlocal thinking
            if piece.text and thinking:
                self._screen.end_line()
            thinking = bool(piece.reasoning) or (thinking and not piece.text)
            self._screen.thinking(piece.reasoning)
            self._screen.answer(piece.text)

        try:
            answer = self._chat.ask(question, show)
        except ServerError as error:
            again = "/new starts over with an empty conversation" if error.context_exceeded else "/retry asks again"
            self._screen.error(f"{error}; {again}")
            return
        if answer.stopped:
            self._screen.note("[stopped]" if answer.text else "[stopped before the answer began; /retry asks again]")
        elif answer.finish_reason == "length":
            self._screen.note("[cut off at its limit of tokens; see /set max_tokens]")
        self._screen.end_line()

    def _help(self, _: str) -> None:
        for line in describe_commands():
            self._screen.note(line)
        self._screen.note('A line that ends in \\ continues on the next one; """ begins and ends several lines.')
        self._screen.note("Ctrl-C stops an answer or clears the line, Ctrl-D leaves.")

    def _new(self, _: str) -> None:
        self._chat.conversation.clear()
        self._screen.note("a new conversation")

    def _system(self, text: str) -> None:
        if text:
            self._chat.conversation.system = None if text == "none" else text
        self._screen.note(f"system prompt: {self._chat.conversation.system or '(none)'}")

    def _set(self, text: str) -> None:
        if text:
            setting = parse_setting(text)
            if setting.value is None:
                self._chat.settings.pop(setting.name, None)
            else:
                self._chat.settings[setting.name] = setting.value
        for line in describe_settings(self._chat.settings):
            if not text or line.split()[0] == setting.name:
                self._screen.note(line)

    def _retry(self, _: str) -> None:
        conversation = self._chat.conversation
        before, was_answered = conversation.messages, conversation.unanswered is None
        question = conversation.take_back()
        if question is None:
            raise CommandError("there is no question yet to ask again")
        self._ask(question)
        if was_answered and conversation.unanswered is not None:
            conversation.messages, conversation.unanswered = before, None  # a failed try does not cost the old answer

    def _undo(self, _: str) -> None:
        question = self._chat.conversation.take_back()
        if question is None:
            raise CommandError("there is nothing to take back")
        self._screen.note(f"taken back: {one_line(question)[:60]}")

    def _save(self, name: str) -> None:
        path = _path(name, "/save")
        if path.exists() and path not in self._own_files:
            raise CommandError(f"{path} exists; name another file")
        count = self._chat.conversation.save(path)
        self._own_files.add(path)
        self._screen.note(f"{count} messages in {path}")

    def _load(self, name: str) -> None:
        path = _path(name, "/load")
        count = self._chat.conversation.load(path)
        self._own_files.add(path)
        self._screen.note(f"{count} messages from {path}")

    def _model(self, name: str) -> None:
        offered = self._chat.models()
        if name and name not in offered:
            near = difflib.get_close_matches(name, offered, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(offered[:8])}"
            raise CommandError(f"the server has no model {name[:80]!r}; {hint}")
        self._chat.model = name or self._chat.model
        for model in offered:
            self._screen.note(f"{'*' if model == self._chat.model else ' '} {model}")

    def _stats(self, _: str) -> None:
        if self._chat.last is None:
            raise CommandError("there is no answer yet to count")
        for line in self._chat.last.describe():
            self._screen.note(line)


def _path(name: str, command: str) -> Path:
    if not name:
        raise CommandError(f"{command} needs a file name")
    try:
        return Path(name).expanduser().absolute()
    except RuntimeError:
        raise CommandError(f"{name} names a home directory that nobody has") from None


def chat_interactively(chat: Chat, screen: Screen, history: History | None) -> int:
    """Read, answer, repeat, until Ctrl-D or /quit. Returns the exit status."""
    try:
        chat.choose_model()
    except ServerError as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 1
    enable_completion()
    screen.note(f"{chat.model} at {chat.base_url} · /help lists the commands, Ctrl-D leaves")
    session = Session(chat, screen)
    while True:
        try:
            entry = read_entry(screen.prompt, screen.continuation)
            history = _kept(history, screen)
            if not session.handle(entry.text if entry.is_block else parse_input(entry.text)):
                return 0
        except CommandError as error:
            screen.error(str(error))
        except KeyboardInterrupt:
            print(flush=True)
        except EOFError:
            print(flush=True)
            return 0


def _kept(history: History | None, screen: Screen) -> History | None:
    """The history with what was just typed; None, with a note, once it cannot be kept any more."""
    try:
        if history is not None:
            history.save()
    except OSError as error:
        _note_not_kept(error, screen)
        return None
    return history


def open_history(environ: dict[str, str], screen: Screen) -> History | None:
    """The history of earlier sessions; None, with a note, where it cannot be kept."""
    try:
        return History(history_path(environ))
    except (OSError, RuntimeError) as error:
        _note_not_kept(error, screen)
        return None


def _note_not_kept(error: OSError | RuntimeError, screen: Screen) -> None:
    reason = error.strerror if isinstance(error, OSError) else error
    screen.note(f"what is typed is not kept for the next time: {reason} (--no-history says nothing about it)")
