"""Log probabilities in the two shapes of the OpenAI API."""

from __future__ import annotations

from ...scheduler.batch import TokenLogprobs
from ..tokenizer import Tokenizer
from .results import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

MINUS_INFINITY = -9999.0
"""OpenAI's stand-in: JSON has no infinity."""


class LogprobsFormatter:
    """For one request; `num_top` is how many of the most probable tokens were asked for."""

    def __init__(self, tokenizer: Tokenizer, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top

    def chat(self, logprobs: list[TokenLogprobs]) -> ChatLogprobs:
        content: list[TokenLogprob] = []
        for entry in logprobs:
            pairs = zip(entry.token_ids, entry.logprobs, strict=True)
            drawn, *top = [self._top(token_id, logprob) for token_id, logprob in pairs]
            content.append(
                TokenLogprob(
                    token=drawn.token, logprob=drawn.logprob, bytes=drawn.bytes, top_logprobs=top[: self._num_top]
                )
            )
        return ChatLogprobs(content=content)

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        text = self._tokenizer.token_text(token_id)
        return TopLogprob(token=text, logprob=_finite(logprob), bytes=list(self._tokenizer.token_bytes(token_id)))

    def completion(self, logprobs: list[TokenLogprobs], text_offset: int) -> CompletionLogprobs:
        """Offsets count the characters of the tokens' own texts, starting at `text_offset`."""
        arrays = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for entry in logprobs:
            texts = [self._tokenizer.token_text(token_id) for token_id in entry.token_ids[: self._num_top + 1]]
            # The drawn token comes first and stays, even where another token has the same text.
            top: dict[str, float] = {}
            for text, logprob in zip(texts, entry.logprobs, strict=False):
                top.setdefault(text, _finite(logprob))
            arrays.tokens.append(texts[0])
            arrays.token_logprobs.append(_finite(entry.logprobs[0]))
            arrays.top_logprobs.append(top)
            arrays.text_offset.append(text_offset)
            text_offset += len(texts[0])
        return arrays


def _finite(logprob: float) -> float:
    """NaN compares false with everything, so it ends up at the bottom too."""
    return logprob if logprob > MINUS_INFINITY else MINUS_INFINITY
