"""What is sent: prompts of a wanted number of tokens, prompts from a file, and when each request is due.

Everything is drawn from (seed, scope, index), so the same request can be made again for another server. Prompts of
random words begin differently, so that no server finds them in its prefix cache unless a share of them is meant to be
found there.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..options import OptionError
from .load_settings import LengthRange

# Common enough to be one token, with the space before them, in the vocabularies of most models.
WORDS = (
    *("time", "people", "way", "water", "words", "day", "part", "number", "sound", "work", "place", "year", "back"),
    *("thing", "name", "sentence", "man", "line", "boy", "farm", "end", "men", "land", "home", "hand", "picture"),
    *("air", "animal", "house", "page", "letter", "answer", "study", "world", "high", "school", "city", "tree", "sun"),
    *("eye", "head", "story", "life", "mile", "night", "river", "car", "feet", "book", "science", "room", "friend"),
    *("idea", "fish", "mountain", "north", "base", "horse", "plant", "paper", "music", "color", "face", "field"),
)
FIRST_WORD = "The"
"""Has no space before it, so in many vocabularies its tokens are not those of the same word further on."""

Messages = list[dict[str, Any]]
Prompt = str | list[int] | Messages


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    prompt: Prompt
    input_tokens: int | None
    """None: the prompt is somebody else's, and only the server knows how long it is."""
    max_tokens: int


@dataclass(frozen=True, slots=True)
class TokenPieces:
    """Makes prompts as token ids: exactly as long as wanted. `pieces` holds the ids of one word each."""

    pieces: tuple[tuple[int, ...], ...]

    def make(self, num_tokens: int, num_shared: int, rng: random.Random, shared: random.Random) -> list[int]:
        return self._draw(num_shared, shared) + self._draw(num_tokens - num_shared, rng)

    def _draw(self, num_tokens: int, rng: random.Random) -> list[int]:
        """A shorter draw from an equal generator is the beginning of a longer one."""
        ids: list[int] = []
        while len(ids) < num_tokens:
            ids += rng.choice(self.pieces)
        return ids[:num_tokens]


@dataclass(frozen=True, slots=True)
class TextWords:
    """Makes prompts as text, for servers that take no token ids, and for chats.

    A prompt has about `overhead + tokens_per_word * words` tokens: exactly so where every word is one token.
    """

    words: tuple[str, ...]
    tokens_per_word: float = 1.0
    overhead: float = 0.0
    """Tokens of the chat template, of what starts every sequence, and of the first word."""

    def make(self, num_tokens: int, num_shared: int, rng: random.Random, shared: random.Random) -> str:
        num_words = max(1, round((num_tokens - self.overhead) / self.tokens_per_word))
        num_shared_words = round(num_words * num_shared / num_tokens)
        return self.of_words(num_words - num_shared_words, rng, num_shared_words, shared)

    def of_words(
        self, num_words: int, rng: random.Random, num_shared_words: int = 0, shared: random.Random | None = None
    ) -> str:
        common = [(shared or rng).choice(self.words) for _ in range(num_shared_words)]
        return " ".join([FIRST_WORD, *common, *(rng.choice(self.words) for _ in range(num_words))])


PromptMaker = TokenPieces | TextWords


def random_requests(
    maker: PromptMaker,
    *,
    seed: int,
    scope: str,
    input_tokens: LengthRange,
    output_tokens: LengthRange,
    shared_prefix: float,
    chat: bool,
) -> Iterator[PlannedRequest]:
    """Without end. Requests of one scope share `shared_prefix` of each prompt; those of different scopes nothing."""
    for index in itertools.count():
        rng = random.Random(f"{seed}/{scope}/{index}")
        num_tokens, max_tokens = input_tokens.draw(rng), output_tokens.draw(rng)
        shared = random.Random(f"{seed}/{scope}/shared")
        prompt: Prompt = maker.make(num_tokens, round(shared_prefix * num_tokens), rng, shared)
        if chat:
            prompt = [{"role": "user", "content": prompt}]
        yield PlannedRequest(prompt, num_tokens, max_tokens)


@dataclass(frozen=True, slots=True)
class FilePrompt:
    prompt: str | Messages
    max_tokens: int | None


def read_prompts(path: str, *, chat: bool) -> list[FilePrompt]:
    """JSON lines with "prompt" or "messages", and "max_tokens" at will; or plain text, a prompt a line.

    Which of the two is decided by the file's first line. Raises OptionError.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise OptionError(f"--prompts: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise OptionError(f"--prompts: {path} is not UTF-8 text") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise OptionError(f"--prompts: {path} holds no prompt")
    if not numbered[0][1].startswith("{"):
        return [_file_prompt(line, None, chat=chat) for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            prompts.append(_parse_line(line, chat=chat))
        except ValueError as error:
            raise OptionError(f"--prompts: {path} line {number}: {error}") from None
    return prompts


def _parse_line(line: str, *, chat: bool) -> FilePrompt:
    try:
        entry = json.loads(line)
    except ValueError:
        raise ValueError("is not JSON, as the file's first line is") from None
    given = [name for name in ("prompt", "messages") if isinstance(entry, dict) and entry.get(name)]
    if len(given) != 1:
        raise ValueError('expected an object with either "prompt" or "messages"')
    value, max_tokens = entry[given[0]], entry.get("max_tokens")
    if given == ["messages"]:
        if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
            raise ValueError('"messages" must be a list of objects')
        if not chat:
            raise ValueError('"messages" need --endpoint chat')
    elif not isinstance(value, str):
        raise ValueError('"prompt" must be text')
    if max_tokens is not None and (not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1):
        raise ValueError('"max_tokens" must be a whole number, 1 or more')
    return _file_prompt(value, max_tokens, chat=chat)


def _file_prompt(value: str | Messages, max_tokens: int | None, *, chat: bool) -> FilePrompt:
    if chat and isinstance(value, str):
        value = [{"role": "user", "content": value}]
    return FilePrompt(value, max_tokens)


def file_requests(
    prompts: Sequence[FilePrompt], *, start: int, seed: int, scope: str, output_tokens: LengthRange
) -> Iterator[PlannedRequest]:
    """The file's prompts in their order from `start` on, again and again without end."""
    for index in itertools.count():
        prompt = prompts[(start + index) % len(prompts)]
        drawn = output_tokens.draw(random.Random(f"{seed}/{scope}/{index}"))
        yield PlannedRequest(prompt.prompt, None, prompt.max_tokens or drawn)


def poisson_arrivals(
    rate_per_s: float, rng: random.Random, *, num_requests: int | None = None, duration_s: float | None = None
) -> list[float]:
    """Seconds after the start at which requests are due: gaps are exponential, so arrivals know nothing of each other.

    Ends at whichever limit comes first; there must be one.
    """
    if num_requests is None and duration_s is None:
        raise ValueError("arrivals without end")
    arrivals: list[float] = []
    due_s = rng.expovariate(rate_per_s)
    while (num_requests is None or len(arrivals) < num_requests) and (duration_s is None or due_s < duration_s):
        arrivals.append(due_s)
        due_s += rng.expovariate(rate_per_s)
    return arrivals
