"""What one run of the load generator is asked to do, read from its flags."""

from __future__ import annotations

import math
import os
import random
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..client_address import DEFAULT_BASE_URL, checked_address, checked_key, find_key
from ..options import OptionError

ENDPOINTS = ("completions", "chat")
DEFAULT_CONCURRENCY = "1,8,32"
SECRET_FLAGS = ("api_key", "compare_api_key")
_SECONDS = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>ms|s|m|)")
_UNIT_SECONDS = {"ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0}
_TO_STANDARD_OUTPUT = "-"


@dataclass(frozen=True, slots=True)
class LengthRange:
    """A number of tokens, drawn uniformly; both ends are included."""

    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """So many requests are open all the time: the next is sent when one has ended."""

    concurrency: int

    @property
    def label(self) -> str:
        return f"concurrency {self.concurrency}"


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """Requests arrive at random, so many a second on average, whether or not earlier ones have ended."""

    rate_per_s: float
    max_concurrency: int | None = None
    """An arrival beyond this many open requests waits; the wait counts as latency."""

    @property
    def label(self) -> str:
        limit = f", at most {self.max_concurrency} open" if self.max_concurrency else ""
        return f"rate {self.rate_per_s:g}/s{limit}"


Level = ClosedLoop | OpenLoop


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request has to meet to count as goodput, in seconds; None: anything will do."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    base_url: str
    """Without the /v1 at its end."""
    compare_url: str | None
    endpoint: str
    model: str | None
    levels: tuple[Level, ...]
    rounds: int
    num_requests: int | None
    duration_s: float | None
    input_tokens: LengthRange
    output_tokens: LengthRange
    prompts_path: str | None
    shared_prefix: float
    seed: int
    temperature: float
    num_warmup: int
    timeout_s: float
    stream: bool
    ignore_eos: bool
    slo: Slo | None
    output_path: str | None
    markdown_path: str | None
    fail_on_error: bool
    command: str
    """The flags that were given, with the keys left out."""
    api_key: str | None = field(default=None, repr=False)
    compare_api_key: str | None = field(default=None, repr=False)

    @property
    def urls(self) -> tuple[str, ...]:
        return (self.base_url,) if self.compare_url is None else (self.base_url, self.compare_url)

    @property
    def reports_to_standard_output(self) -> bool:
        """Whether a file of results goes there, so that tables have to go elsewhere."""
        return _TO_STANDARD_OUTPUT in (self.output_path, self.markdown_path)

    def num_requests_of(self, level: Level) -> int | None:
        """Requests in one round of a level; None: as many as fit into the duration."""
        if self.num_requests is not None or self.duration_s is not None:
            return self.num_requests
        return max(8, 4 * level.concurrency) if isinstance(level, ClosedLoop) else 50


def read_settings(given: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Settings:
    """`given` holds only the flags that were on the command line, as text. Raises OptionError."""
    environ = os.environ if environ is None else environ
    _check_combinations(given)
    compare_url, compare_key = given.get("compare"), given.get("compare_api_key")
    slo = given.get("slo")
    return Settings(
        base_url=_root("--base-url", given.get("base_url", DEFAULT_BASE_URL)),
        compare_url=None if compare_url is None else _root("--compare", compare_url),
        endpoint=_parse("endpoint", given, "completions", _endpoint),
        model=given.get("model"),
        levels=_levels(given),
        rounds=_parse("rounds", given, "4" if compare_url else "1", _whole(1, 1000)),
        num_requests=_parse("num_requests", given, None, _whole(1)),
        duration_s=_parse("duration", given, None, parse_seconds),
        input_tokens=_parse("input_tokens", given, "128", parse_length_range),
        output_tokens=_parse("output_tokens", given, "128", parse_length_range),
        prompts_path=given.get("prompts"),
        shared_prefix=_parse("shared_prefix", given, "0", _number(0, 1, "a share from 0 to 1")),
        seed=_parse("seed", given, str(random.SystemRandom().randrange(2**31)), _whole(0, 2**63 - 1)),
        temperature=_parse("temperature", given, "0", _number(0, 100, "a temperature, 0 or more")),
        num_warmup=_parse("warmup", given, "2", _whole(0)),
        timeout_s=_parse("timeout", given, "600", parse_seconds),
        stream="no_stream" not in given,
        ignore_eos="no_ignore_eos" not in given,
        slo=None if slo is None else parse_slo(slo),
        output_path=given.get("output"),
        markdown_path=given.get("markdown"),
        fail_on_error="fail_on_error" in given,
        command=command_line(given),
        api_key=find_key(given.get("api_key"), environ),
        compare_api_key=None if compare_key is None else checked_key("--compare-api-key", compare_key),
    )


def command_line(given: Mapping[str, Any]) -> str:
    """The command, written out from its flags; keys become ***."""
    parts = ["octavo", "bench", "serve"]
    for name, value in given.items():
        parts.append("--" + name.replace("_", "-"))
        if value is not True:
            parts.append("***" if name in SECRET_FLAGS else str(value))
    return " ".join(part if part == "***" else shlex.quote(part) for part in parts)


def parse_length_range(text: str) -> LengthRange:
    """Tokens from "128" or "64-256". Raises ValueError."""
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text.strip())
    if match is None:
        raise ValueError("expected a number of tokens such as 128, or a range such as 64-256")
    low, high = int(match[1]), int(match[2] or match[1])
    if not 1 <= low <= high:
        raise ValueError("expected at least 1 token, and the smaller end of a range first")
    return LengthRange(low, high)


def parse_seconds(text: str) -> float:
    """Seconds from "1.5", "1.5s", "1500ms" or "2m". Raises ValueError."""
    match = _SECONDS.fullmatch(text.strip().lower())
    if match is None or not 0 < float(match["number"]) < 1e9:
        raise ValueError("expected a time above 0, such as 0.5, 500ms or 2m (seconds where no unit is given)")
    return float(match["number"]) * _UNIT_SECONDS[match["unit"]]


def parse_slo(text: str) -> Slo:
    """From "ttft=0.5,tpot=50ms,e2e=10". Raises OptionError."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if name not in ("ttft", "tpot", "e2e") or not equals or name + "_s" in limits:
            raise OptionError(f"--slo: expected ttft=, tpot= and e2e=, each at most once (given: {part[:80]!r})")
        try:
            limits[name + "_s"] = parse_seconds(value)
        except ValueError as error:
            raise OptionError(f"--slo {name}: {error} (given: {value[:80]!r})") from None
    return Slo(**limits)


def _check_combinations(given: Mapping[str, Any]) -> None:
    def refuse(one: str, other: str, why: str) -> None:
        if one in given and other in given:
            flags = [f"--{name.replace('_', '-')}" for name in (one, other)]
            raise OptionError(f"{flags[0]} and {flags[1]} exclude each other: {why}")

    refuse("prompts", "input_tokens", "the file decides how long the prompts are")
    refuse("prompts", "shared_prefix", "the file decides what the prompts share")
    if "max_concurrency" in given and "rate" not in given:
        raise OptionError("--max-concurrency limits arrivals at a --rate; for a closed loop give --concurrency")
    if "compare_api_key" in given and "compare" not in given:
        raise OptionError("--compare-api-key needs --compare")
    if given.get("output") == given.get("markdown") == _TO_STANDARD_OUTPUT:
        raise OptionError("--output - and --markdown - cannot both go to standard output")
    timed = [name for name in ("ttft", "tpot") if name + "=" in given.get("slo", "")]
    if "no_stream" in given and timed:
        raise OptionError(f"--slo {timed[0]}= needs streaming: leave out --no-stream, or ask for e2e= only")


def _levels(given: Mapping[str, Any]) -> tuple[Level, ...]:
    """Closed loops first; the default ones only if no rate is asked for."""
    limit = _parse("max_concurrency", given, None, _whole(1))
    default = None if "rate" in given else DEFAULT_CONCURRENCY
    closed = _parse("concurrency", given, default, _each(_whole(1, 65536))) or ()
    rates = _parse("rate", given, None, _each(_number(1e-6, 1e6, "requests per second above 0"))) or ()
    return (*(ClosedLoop(concurrency) for concurrency in closed), *(OpenLoop(rate, limit) for rate in rates))


def _parse(name: str, given: Mapping[str, Any], default: str | None, parse: Callable[[str], Any]) -> Any:
    text = given.get(name, default)
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError as error:
        raise OptionError(f"--{name.replace('_', '-')}: {error} (given: {text[:80]!r})") from None


def _whole(low: int, high: int = 10**9) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,19}", text.strip()) or not low <= int(text) <= high:
            raise ValueError(f"expected a whole number, {low} or more")
        return int(text)

    return parse


def _number(low: float, high: float, what: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise ValueError(f"expected {what}")
        return value

    return parse


def _each(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Comma-separated values, none twice: levels are told apart by theirs."""

    def parse_all(text: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(parse(part) for part in text.split(",")))

    return parse_all


def _endpoint(text: str) -> str:
    if text not in ENDPOINTS:
        raise ValueError(f"expected one of {', '.join(ENDPOINTS)}")
    return text


def _root(flag: str, text: str) -> str:
    """The server's address without its version. Raises OptionError."""
    return checked_address(flag, text).removesuffix("/v1")
