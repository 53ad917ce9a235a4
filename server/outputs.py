"""From token ids to text: detokenise, find stop strings, count.

`TextAssembler` is the synchronous core, for every front end; `GenerationStream` reads a `RequestStream` through it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from ..scheduler.batch import TokenLogprobs
from .detokenizer import Detokenizer
from .engine.client import EngineClient, RequestStream
from .engine.messages import GenerateRequest, RequestError, RequestTimings, TokenOutput
from .tokenizer import Tokenizer

PROMPT_TAIL_TOKENS = 16
"""How much of the prompt a detokeniser sees: enough for any multi-byte character and space rule to be settled."""


@dataclass(slots=True)
class TextDelta:
    """What one wake-up brought for one sample."""

    index: int
    text: str = ""
    """May lag behind the tokens: incomplete characters and possible stop strings are held back."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    """One entry per token of `token_ids`, when asked for."""
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for eos and length."""
    timings: RequestTimings | None = None
    """With `finish_reason`."""


class GenerationFailed(Exception):
    """The engine ended a request with an error."""

    def __init__(self, error: RequestError) -> None:
        super().__init__(error.message)
        self.error = error


class StopMatcher:
    """Finds stop strings in text that comes in pieces, holding back only what may be the start of one.

    The match that is complete first wins, whatever the pieces, so that the result does not depend on how tokens
    were batched. `_held` is always the longest end of the text so far that properly starts some stop string.
    """

    def __init__(self, stops: tuple[str, ...], *, include_stop: bool) -> None:
        self._stops = stops
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """The text that is now certain, and the stop string if one was completed by this piece."""
        buffer = self._held + text
        if may_stop and text:
            found = self._first_match(buffer, len(self._held))
            if found is not None:
                end, stop = found
                self._held = ""
                return buffer[: end if self._include_stop else end - len(stop)], stop
        num_held = self._num_held(buffer)
        self._held = buffer[len(buffer) - num_held :]
        return buffer[: len(buffer) - num_held], None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _first_match(self, buffer: str, num_searched: int) -> tuple[int, str] | None:
        """End and string of the match that ends first (the longest of those), past what was searched already."""
        best: tuple[int, str] | None = None
        for stop in self._stops:
            start = buffer.find(stop, max(0, num_searched - len(stop) + 1))
            if start < 0:
                continue
            end = start + len(stop)
            if best is None or end < best[0] or (end == best[0] and len(stop) > len(best[1])):
                best = (end, stop)
        return best

    def _num_held(self, buffer: str) -> int:
        longest = 0
        for stop in self._stops:
            start = max(0, len(buffer) - len(stop) + 1)
            while (start := buffer.find(stop[0], start)) >= 0:
                if len(buffer) - start <= longest:
                    break
                if stop.startswith(buffer[start:]):
                    longest = len(buffer) - start
                    break
                start += 1
        return longest


class _Sample:
    """One sample's text so far."""

    __slots__ = ("detokenizer", "finished", "matcher", "num_tokens", "timings")

    def __init__(self, detokenizer: Detokenizer, matcher: StopMatcher | None) -> None:
        self.detokenizer = detokenizer
        self.matcher = matcher
        self.num_tokens = 0
        self.finished = False
        self.timings: RequestTimings | None = None
        """The engine's latest; they come with its first and its last output."""

    def timings_until_now(self) -> RequestTimings | None:
        """For a sample that ends here and not in the engine, whose clock is the same."""
        if self.timings is None:
            return None
        return msgspec.structs.replace(self.timings, last_token=max(self.timings.first_token, time.monotonic()))


class TextAssembler:
    """All samples of one request, from `TokenOutput`s to `TextDelta`s.

    `abort(sample_index)` is called when a stop string ends a sample that the engine would continue.
    """

    def __init__(self, request: GenerateRequest, tokenizer: Tokenizer, abort: Callable[[int], None]) -> None:
        params = request.params
        tail = request.prompt_token_ids[-PROMPT_TAIL_TOKENS:]
        self._params = params
        self._abort = abort
        self._stop_token_ids = frozenset(params.stop_token_ids)
        self._samples = [
            _Sample(
                Detokenizer(tokenizer, tail, params.skip_special_tokens),
                StopMatcher(params.stop, include_stop=params.include_stop_str_in_output) if params.stop else None,
            )
            for _ in range(params.n)
        ]
        self._num_open_samples = params.n
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_cached_tokens = 0
        """Of sample 0, which computed the prompt: what the others share with it is no cache hit."""
        self.error: RequestError | None = None
        """Set when the engine failed the request; nothing is processed after that."""

    @property
    def finished(self) -> bool:
        """Every sample has ended."""
        return self._num_open_samples == 0

    @property
    def num_completion_tokens(self) -> int:
        return sum(sample.num_tokens for sample in self._samples)

    def process(self, outputs: list[TokenOutput]) -> list[TextDelta]:
        """One delta for each sample that has something new, in order of first appearance."""
        deltas: dict[int, TextDelta] = {}
        for output in outputs:
            if output.finish_reason in ("error", "abort"):
                self.error = output.error or RequestError(
                    code="internal_error", message="the engine stopped working on this request"
                )
                break
            sample = self._samples[output.sample_index]
            if sample.finished:
                continue
            if output.sample_index == 0 and sample.num_tokens == 0:
                self.num_cached_tokens = output.num_cached_tokens
            if output.timings is not None:
                sample.timings = output.timings
            delta = deltas.get(output.sample_index)
            if delta is None:
                delta = deltas[output.sample_index] = TextDelta(output.sample_index)
            self._extend(sample, output, delta)
        return list(deltas.values())

    def _extend(self, sample: _Sample, output: TokenOutput, delta: TextDelta) -> None:
        """Add one output to its sample's delta."""
        visible_ids = output.token_ids
        if output.stop_token_id is not None and not self._params.include_stop_str_in_output:
            visible_ids = visible_ids[:-1]
        stop: str | None = None
        num_taken = len(output.token_ids)
        if sample.matcher is None:
            delta.text += sample.detokenizer.push(visible_ids)
        else:
            text, num_searched, stop = self._search(sample, sample.matcher, visible_ids)
            delta.text += text
            if stop is not None:
                num_taken = num_searched
        sample.num_tokens += num_taken
        delta.token_ids += output.token_ids[:num_taken]
        if output.logprobs is not None:
            delta.logprobs = (delta.logprobs or []) + output.logprobs[:num_taken]
        if stop is None and output.finish_reason is not None:
            text, stop = self._flush(sample)
            delta.text += text
        if stop is not None or output.finish_reason is not None:
            self._finish(sample, output, delta, stop)

    def _search(self, sample: _Sample, matcher: StopMatcher, token_ids: list[int]) -> tuple[str, int, str | None]:
        """Token by token, so that tokens after a stop string are neither counted nor shown."""
        text = ""
        for position, token_id in enumerate(token_ids, start=1):
            may_stop = sample.num_tokens + position >= self._params.min_tokens
            certain, stop = matcher.push(sample.detokenizer.push([token_id]), may_stop=may_stop)
            text += certain
            if stop is not None:
                return text, position, stop
        return text, len(token_ids), None

    def _flush(self, sample: _Sample) -> tuple[str, str | None]:
        """What was held back for a sample that has ended."""
        rest = sample.detokenizer.flush()
        if sample.matcher is None:
            return rest, None
        text, stop = sample.matcher.push(rest, may_stop=sample.num_tokens >= self._params.min_tokens)
        return text + sample.matcher.flush(), stop

    def _finish(self, sample: _Sample, output: TokenOutput, delta: TextDelta, stop: str | None) -> None:
        sample.finished = True
        self._num_open_samples -= 1
        if stop is not None:
            delta.finish_reason, delta.stop_reason = "stop", stop
            if output.finish_reason is None:
                self._abort(output.sample_index)
        else:
            delta.finish_reason = "stop" if output.finish_reason == "stop" else "length"
            if output.stop_token_id in self._stop_token_ids:
                delta.stop_reason = output.stop_token_id
        ended_in_engine = output.finish_reason is not None and output.timings is not None
        delta.timings = output.timings if ended_in_engine else sample.timings_until_now()


class GenerationObserver(Protocol):
    """Whoever measures a request; see request_metrics.py."""

    def on_deltas(self, deltas: list[TextDelta], num_cached_tokens: int, now: float) -> None: ...

    def on_closed(self, error: RequestError | None, now: float) -> None:
        """Once, at the end. Samples without a finish were aborted, or failed with `error`."""


class GenerationStream:
    """The text of one submitted request, as it comes. Whoever holds it must `close` it."""

    def __init__(
        self,
        client: EngineClient,
        request: GenerateRequest,
        stream: RequestStream,
        tokenizer: Tokenizer,
        observer: GenerationObserver | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_close` is called exactly once, by the first `close`."""
        self._client = client
        self._stream = stream
        self._observer = observer
        self._on_close = on_close
        self._closed = False
        self.text = TextAssembler(
            request, tokenizer, lambda sample_index: client.abort(request.request_id, sample_index)
        )

    @property
    def finished(self) -> bool:
        return self.text.finished

    async def next(self) -> list[TextDelta]:
        """What has arrived since the last call, waiting for something; empty only once `finished`.

        Raises GenerationFailed, after everything that arrived before the failure was returned.
        """
        while not self.text.finished:
            if self.text.error is not None:
                raise GenerationFailed(self.text.error)
            outputs = await self._stream.next()
            deltas = self.text.process(outputs)
            if deltas:
                if self._observer is not None:
                    self._observer.on_deltas(deltas, self.text.num_cached_tokens, time.monotonic())
                return deltas
            if not outputs and self.text.error is None:
                # A stream that ended before its samples did would otherwise spin here for ever.
                self.text.error = RequestError(code="internal_error", message="the engine's output ended early")
        return []

    def close(self, *, refused: bool = False) -> None:
        """Release the request, aborting what of it still runs. Idempotent.

        `refused`: the caller's whole request was turned down, so how this part of it ended is not observed.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._client.release(self._stream.request_id)
            if self._observer is not None and not refused:
                self._observer.on_closed(self.text.error, time.monotonic())
        finally:
            self._on_close()
