"""Gets to know a server before it is measured: model, version, which fields it takes, how its tokens are counted."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

from ...model.text import one_line
from ..client_events import read_json
from .load_client import Dialect, LoadClient, Record, client_for
from .load_settings import Settings
from .load_workload import WORDS, PlannedRequest, Prompt, PromptMaker, TextWords, TokenPieces

PROBE_TIMEOUT_S = 120.0
"""Whatever the limit of measured requests: the first ones of a server may have to wait for it to warm up."""
LOOK_UP_TIMEOUT_S = 10.0
"""For what not every server has: some gateways leave a path that they do not know unanswered."""
PROBE_WORDS = (8, 40)
"""Two lengths, which tell what a word costs from what a prompt costs."""
_LABEL = re.compile(r'(\w+)="([^"\\]*)"')
_FIELDS = {
    "continuous_usage": "stream_options.continuous_usage_stats",
    "ignore_eos": "ignore_eos",
    "include_usage": "stream_options",
}


class ServerUnusable(Exception):
    """It cannot be measured; the message is one line that says why."""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """For the report: what was measured."""

    url: str
    model: str
    owned_by: str | None
    version: str | None
    cache_config: dict[str, str]
    """The labels of the metric `cache_config_info`, which Octavo and vLLM publish."""
    prompts_as: str
    """"token ids", "text" or "file"."""
    counts_tokens_per_chunk: bool
    """Whether every chunk says how many tokens there are so far."""
    sends_usage: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Target:
    client: LoadClient
    maker: PromptMaker
    facts: ServerFacts


@dataclass(slots=True)
class Probe:
    """One server being asked."""

    settings: Settings
    client: LoadClient
    sends_usage: bool = True
    notes: list[str] = field(default_factory=list)

    async def get(self, path: str, timeout_s: float = PROBE_TIMEOUT_S) -> tuple[int, str]:
        """Status and body. Raises ServerUnusable if nothing answers."""
        url = self.client.root + path
        try:
            async with (
                asyncio.timeout(timeout_s),
                self.client.session.get(url, headers=self.client.headers) as response,
            ):
                return response.status, await response.text(errors="replace")
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            reason = "timeout" if isinstance(error, TimeoutError) else one_line(str(error), 200)
            raise ServerUnusable(
                f"cannot reach {url}: {reason or type(error).__name__}; is a server running?"
            ) from None

    async def look_up(self, path: str) -> str | None:
        """The body of what a server may well be without; None where there is none, or no answer in time."""
        try:
            status, text = await self.get(path, LOOK_UP_TIMEOUT_S)
        except ServerUnusable:
            return None
        return text if status == 200 else None

    async def model(self) -> tuple[str, str | None]:
        """The wanted or the first model, and who serves it. Raises ServerUnusable."""
        status, text = await self.get("/v1/models")
        if status in (401, 403):
            raise ServerUnusable(f"{self.client.root} answers {status}: it wants another --api-key")
        listed = read_json(text)
        cards = listed.get("data") if status == 200 and isinstance(listed, dict) else None
        cards = [card for card in cards or () if isinstance(card, dict) and isinstance(card.get("id"), str)]
        wanted = self.settings.model
        if wanted is None and not cards:
            raise ServerUnusable(f"{self.client.root}/v1/models lists no model (status {status}): give --model")
        card: dict[str, Any] = next((card for card in cards if wanted in (None, card["id"])), {})
        if wanted is not None and cards and not card:
            # Some servers load models by name, so it may still work; the first request will tell.
            self.notes.append(f"/v1/models does not list {wanted}")
        owner = card.get("owned_by")
        return wanted or card["id"], one_line(owner) if isinstance(owner, str) else None

    async def version(self) -> str | None:
        """As Octavo and vLLM say it, else llama.cpp's build."""
        for path, name in (("/version", "version"), ("/props", "build_info")):
            answer = read_json(await self.look_up(path) or "")
            if isinstance(answer, dict) and isinstance(answer.get(name), str):
                return one_line(answer[name])
        return None

    async def cache_config(self) -> dict[str, str]:
        text = await self.look_up("/metrics") or ""
        match = re.search(r"^\w+:cache_config_info\{(.*)\} 1", text, re.MULTILINE)
        return {name: one_line(value) for name, value in _LABEL.findall(match[1])} if match else {}

    async def ask(self, prompt: Prompt, max_tokens: int, dialect: Dialect | None = None) -> Record:
        """One request on the measured way."""
        client = self.client if dialect is None else self.client.with_dialect(dialect)
        client = replace(client, timeout_s=PROBE_TIMEOUT_S)
        if client.endpoint == "chat" and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        request = PlannedRequest(prompt, None, max_tokens)
        return await client.send(request, client.body(request))

    async def dialect(self) -> Dialect:
        """The richest that the server does not refuse. Raises ServerUnusable."""
        first: Record | None = None
        for dialect in _dialects(self.client.dialect, self.settings.stream):
            record = await self.ask("The river and the mountain", 4, dialect)
            if record.ok or record.error_kind == "empty answer":
                return self._settle(dialect, record)
            first = first or record
            if record.error_kind not in ("HTTP 400", "HTTP 422"):
                break
        assert first is not None
        raise ServerUnusable(f"{self.client.url} failed a first request: {first.error_kind}: {first.error_message}")

    def _settle(self, dialect: Dialect, record: Record) -> Dialect:
        """What was taken may still have been ignored: only what came back counts."""
        for name, written in _FIELDS.items():
            if getattr(self.client.dialect, name) and not getattr(dialect, name):
                self.notes.append(f"the server refuses {written}, which is left out")
        if dialect.max_completion_tokens:
            self.notes.append("the server takes max_completion_tokens only")
        if record.usage.output_tokens is None:
            if not self.settings.stream:
                raise ServerUnusable("the server's answers hold no usage, so nothing can be counted; try streaming")
            self.sends_usage = False
            self.notes.append("the server sends no usage: output tokens are counted as chunks, prompt tokens unknown")
        # One chunk with a count, at the end, is the usual; a second one means that all of them have it.
        return replace(dialect, continuous_usage=dialect.continuous_usage and record.num_counts > 1)

    async def count(self, text: str) -> tuple[int, tuple[int, ...]] | None:
        """(tokens, their ids or nothing) by the server's own tokenizer; None if it does not tell."""
        url = self.client.root + "/tokenize"
        bodies = (
            {"model": self.client.model, "prompt": text, "add_special_tokens": False},  # Octavo, vLLM, SGLang
            {"content": text, "add_special": False},  # llama.cpp
        )
        for body in bodies:
            try:
                async with (
                    asyncio.timeout(PROBE_TIMEOUT_S),
                    self.client.session.post(url, json=body, headers=self.client.headers) as response,
                ):
                    answer = read_json(await response.text(errors="replace")) if response.status == 200 else None
            except (TimeoutError, aiohttp.ClientError, OSError):
                return None
            if isinstance(answer, dict) and (counted := _counted(answer)) is not None:
                return counted
        return None

    async def maker(self, *, as_text: bool) -> PromptMaker:
        """Prompts as token ids where the server takes them, else as text of words that are one token each."""
        if await self.count(" " + WORDS[0]) is None:
            return await self._text_maker(WORDS)
        counts = await asyncio.gather(*(self.count(" " + word) for word in WORDS))
        pieces = tuple(ids for _, ids in filter(None, counts) if ids)
        if self.settings.endpoint == "completions" and pieces and not as_text:
            by_ids = TokenPieces(pieces)
            record = await self.ask(by_ids.make(24, 0, random.Random(0), random.Random(0)), 1)
            if record.ok and record.usage.prompt_tokens == 24:
                return by_ids
        single = tuple(word for word, counted in zip(WORDS, counts, strict=True) if counted and counted[0] == 1)
        return await self._text_maker(single if len(single) >= len(WORDS) // 2 else WORDS)

    async def _text_maker(self, words: tuple[str, ...]) -> TextWords:
        """Calibrated by the prompt lengths that the server reports for two prompts."""
        maker = TextWords(words)
        lengths = []
        for num_words in PROBE_WORDS:
            record = await self.ask(maker.of_words(num_words, random.Random(num_words)), 1)
            lengths.append(record.usage.prompt_tokens)
        if lengths[0] is None or lengths[1] is None or lengths[1] <= lengths[0]:
            self.notes.append("prompt lengths are a guess, one token per word: the server does not report them")
            return maker
        tokens_per_word = (lengths[1] - lengths[0]) / (PROBE_WORDS[1] - PROBE_WORDS[0])
        return replace(maker, tokens_per_word=tokens_per_word, overhead=lengths[0] - tokens_per_word * PROBE_WORDS[0])


async def get_to_know_all(settings: Settings, session: aiohttp.ClientSession) -> list[Target]:
    """Every server of a run, one after the other; all get their prompts in the same form. Raises ServerUnusable."""
    keys = (settings.api_key, settings.compare_api_key)
    asked = list(zip(settings.urls, keys, strict=False))
    targets = [await get_to_know(settings, session, root, key) for root, key in asked]
    if len({target.facts.prompts_as for target in targets}) > 1:
        targets = [await get_to_know(settings, session, root, key, as_text=True) for root, key in asked]
    return targets


async def get_to_know(
    settings: Settings, session: aiohttp.ClientSession, root: str, api_key: str | None, *, as_text: bool = False
) -> Target:
    """Everything that a measurement needs to know of a server; `as_text` rules token ids out. Raises ServerUnusable."""
    probe = Probe(settings, client_for(settings, session, root, api_key, settings.model or ""))
    name, owner = await probe.model()
    probe.client.model = name
    version, cache_config = await probe.version(), await probe.cache_config()
    probe.client.dialect = await probe.dialect()
    maker: PromptMaker = TextWords(WORDS)
    if settings.prompts_path is None:
        maker = await probe.maker(as_text=as_text)
    dialect = probe.client.dialect
    prompts_as = "token ids" if isinstance(maker, TokenPieces) else "text"
    facts = ServerFacts(
        url=root,
        model=one_line(name),
        owned_by=owner,
        version=version,
        cache_config=cache_config,
        prompts_as=prompts_as if settings.prompts_path is None else "file",
        counts_tokens_per_chunk=settings.stream and dialect.include_usage and dialect.continuous_usage,
        sends_usage=probe.sends_usage,
        notes=tuple(probe.notes),
    )
    return Target(probe.client, maker, facts)


def _dialects(wanted: Dialect, stream: bool) -> Iterator[Dialect]:
    """`wanted`, then with one field less, then with two, … each also under the newer name of the limit at last."""
    names = [name for name in _FIELDS if getattr(wanted, name) and (stream or name == "ignore_eos")]
    for newer_name in (False, True):
        for num_dropped in range(len(names) + 1):
            for dropped in itertools.combinations(names, num_dropped):
                changes: dict[str, Any] = dict.fromkeys(dropped, False)
                yield replace(wanted, max_completion_tokens=newer_name, **changes)


def _counted(answer: dict[str, Any]) -> tuple[int, tuple[int, ...]] | None:
    tokens, count = answer.get("tokens"), answer.get("count")
    if isinstance(tokens, list) and all(isinstance(token, int) for token in tokens):
        return len(tokens), tuple(tokens)
    return (count, ()) if isinstance(count, int) else None
