"""Token ids to text as they arrive, a few at a time."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from .tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# A character of at most four bytes is complete after four tokens; what still ends in U+FFFD then is no character.
_MAX_HELD_TOKENS = 8


class Detokenizer:
    """The text of one growing sequence. A character whose bytes are spread over tokens is held back until complete.

    All that `push` returned, followed by `flush`, equals `Tokenizer.decode` of all ids pushed (with continuation=True
    where a prompt precedes them). Not safe for several threads.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids_tail: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        """prompt_ids_tail: the last few ids before the first one pushed; empty if there are none."""
        self._strip = tokenizer.strips_leading_space and not prompt_ids_tail
        self._table = tokenizer.bytes_table(skip_special_tokens)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._window = None
        if tokenizer.family == "other":
            self._window = _Window(tokenizer, prompt_ids_tail, skip_special_tokens)

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; "" while a character is incomplete."""
        if self._window is not None:
            return self._window.push(ids)
        table = self._table
        text = self._decoder.decode(b"".join([table[token_id] for token_id in ids]))
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        """What was held back, with U+FFFD for bytes that never became a character. Ends the sequence."""
        if self._window is not None:
            return self._window.flush()
        return self._decoder.decode(b"", final=True)


class _Window:
    """For decoders that are no concatenation of pieces (WordPiece and the like): decode a short window twice and take
    the difference, as vLLM's and TGI's detokenisers do."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids_tail: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids = list(prompt_ids_tail[-_MAX_HELD_TOKENS:])
        self._shown = len(self._ids)
        """ids[:shown] are out already and only give context."""

    def push(self, ids: Sequence[int]) -> str:
        return "".join([self._push_one(token_id) for token_id in ids])

    def flush(self) -> str:
        text = self._difference()
        self._shown = len(self._ids)
        return text

    def _push_one(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._difference()
        held = len(self._ids) - self._shown
        if not text or (text.endswith(_REPLACEMENT) and held < _MAX_HELD_TOKENS):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return text

    def _difference(self) -> str:
        decode = self._tokenizer.decode
        before = decode(self._ids[: self._shown], skip_special_tokens=self._skip)
        return decode(self._ids, skip_special_tokens=self._skip)[len(before) :]
