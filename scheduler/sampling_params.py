"""What a caller may ask of sampling and stopping: one frozen, validated type for every front end."""

from __future__ import annotations

import math
from typing import Any

import msgspec

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 1024


class InvalidRequest(ValueError):
    """A request that can never be served as it stands: the caller's mistake, answered with 400.

    `param` names the offending field as the caller wrote it (None where no single field is to blame);
    `code` is the machine-readable reason (OpenAI's `code`), None for a plain invalid value.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose each next token and when to stop.

    Names and meanings follow the OpenAI API, the extensions those of vLLM.
    Construction raises `InvalidRequest` for values outside their range; limits that depend on the model
    (vocabulary, context length) are checked by `check_against`.
    """

    n: int = 1
    """Number of samples drawn for the prompt; they share its KV blocks."""
    temperature: float = 1.0
    """0 is greedy (arg max, lowest token id on ties)."""
    top_p: float = 1.0
    top_k: int = 0
    """Keep the k most probable tokens; 0 (or −1) keeps all."""
    min_p: float = 0.0
    """Drop tokens less probable than this fraction of the most probable one."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen in prompt or output (Keskar et al. 2019)."""
    logit_bias: dict[int, float] = {}
    """token id → value added to its logit."""
    seed: int | None = None
    """With a seed, the draw at a position depends on (seed, position) alone, not on the batch."""
    max_tokens: int | None = None
    """None: up to the model's context length."""
    min_tokens: int = 0
    """No stop condition but `max_tokens` applies, and eos cannot be drawn, before this many tokens."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none. k: the drawn token's log probability and those of the k most probable tokens (k may be 0)."""
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_stops()

    def _check_ranges(self) -> None:
        _integer("n", self.n, 1, 2**16)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _optional_integer("seed", self.seed, -(2**63), 2**63 - 1)
        _optional_integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        _optional_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})", param="min_tokens"
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(f"logit_bias may hold at most {MAX_LOGIT_BIAS} entries", param="logit_bias")
        for token_id, bias in self.logit_bias.items():
            _integer("logit_bias", token_id, 0, 2**31 - 1)
            _number("logit_bias", bias, -100.0, 100.0)

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop may hold at most {MAX_STOP_STRINGS} strings", param="stop")
        for text in self.stop:
            if not text:
                raise InvalidRequest("stop strings must not be empty", param="stop")
            if len(text) > MAX_STOP_STRING_CHARS:
                raise InvalidRequest(f"a stop string may have at most {MAX_STOP_STRING_CHARS} characters", param="stop")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidRequest(f"stop_token_ids may hold at most {MAX_STOP_TOKEN_IDS} ids", param="stop_token_ids")
        for token_id in self.stop_token_ids:
            _integer("stop_token_ids", token_id, 0, 2**31 - 1)

    def check_against(self, *, vocab_size: int, max_num_seqs: int) -> None:
        """Check what depends on the served model; raises `InvalidRequest`. `vocab_size` is the logits' width."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise InvalidRequest(
                        f"{name}: token id {token_id} is outside the vocabulary of {vocab_size}", param=name
                    )
        if self.n > max_num_seqs:
            raise InvalidRequest(f"n ({self.n}) exceeds the server's limit of {max_num_seqs} sequences", param="n")

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def may_edit_logits(self) -> bool:
        """Whether any token is drawn from other logits than the model's, or asked more of than to be drawn."""
        return self.has_penalties or len(self.logit_bias) > 0 or self.logprobs is not None or self.min_tokens > 0


def _integer(name: str, value: Any, low: int, high: int) -> None:
    # bool is an int in Python; a caller who writes `"n": true` has made a mistake.
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be an integer", param=name)
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must be between {low} and {high}", param=name)


def _optional_integer(name: str, value: Any, low: int, high: int) -> None:
    if value is not None:
        _integer(name, value, low, high)


def _number(name: str, value: Any, low: float, high: float, *, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a finite number", param=name)
    if not low <= value <= high or (low_open and value == low):
        bound = f"greater than {low:g}" if low_open else f"at least {low:g}"
        raise InvalidRequest(f"{name} must be {bound} and at most {high:g}", param=name)
