"""Generating with the cache and without it, on the server's own engine in this process.

With the cache, a generation is one request. Without it, every token is a request of its own over the prompt and all
tokens so far, with prefix caching off: the engine has no way but to compute every key and value again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...scheduler.batch import TokenLogprobs
from ...scheduler.sampling_params import MAX_LOGPROBS, SamplingParams
from ..config import EngineConfig
from ..engine.inline import InlineClient
from ..engine.messages import GenerateRequest
from ..engine.startup import build_engine
from ..outputs import GenerationFailed
from .kv_cache import NEAR_TIE_GAPS, Parting, Run, Work, cached_work


class UncountedWork(Exception):
    """The engine computed or reused something else than the measurement is about; the message is one line."""


@dataclass(slots=True)
class _Answer:
    """One request, from its submission to its last token."""

    token_ids: list[int] = field(default_factory=list)
    token_seconds: list[float] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_computed: int = 0
    """Tokens that went through the model."""
    num_from_prefix_cache: int = 0


class BenchEngine:
    """An engine that serves one greedy request at a time."""

    def __init__(self, config: EngineConfig) -> None:
        """Loads the model. Raises ModelError; ValueError if prefix caching is on."""
        if config.cache.enable_prefix_caching:
            raise ValueError("prefix caching would turn recomputing into reusing")
        core, self.ready = build_engine(config)
        self._client = InlineClient(core, self.ready)
        self._ids = itertools.count()

    def generate_cached(self, prompt: Sequence[int], num_output: int) -> Run:
        """One request. Raises GenerationFailed, or UncountedWork if more was computed than each newest token."""
        answer = self._ask(prompt, num_output)
        # What was not computed was read: `_ask` has checked the count of the one, so that of the other follows.
        num_reused = cached_work(len(prompt), num_output).num_reused
        return Run(answer.token_ids, answer.token_seconds, Work(answer.num_computed, num_reused))

    def generate_recomputed(self, prompt: Sequence[int], forced: Sequence[int]) -> Run:
        """One request per token. The context goes on with `forced` whatever is drawn, so that the work is the same as
        in the run that drew it. Raises GenerationFailed, or UncountedWork if anything was reused."""
        context = [*prompt]
        answers = []
        for token_id in forced:
            answers.append(self._ask(context, 1))
            context.append(token_id)
        return Run(
            [answer.token_ids[0] for answer in answers],
            [answer.token_seconds[0] for answer in answers],
            Work(sum(answer.num_computed for answer in answers), 0),
        )

    def explain(self, prompt: Sequence[int], forced: Sequence[int], differing: dict[int, int]) -> list[Parting]:
        """`differing`: index of an output token → what recomputing drew there instead of `forced[index]`. Looks at the
        log probabilities of both ways, in runs of their own that nobody times."""
        if not differing:
            return []
        tolerance = NEAR_TIE_GAPS[self.ready.dtype]
        again = self._ask(prompt, max(differing) + 1, logprobs=MAX_LOGPROBS)
        partings = []
        for index, other in sorted(differing.items()):
            chosen = forced[index]
            gap = None
            if again.token_ids[: index + 1] == [*forced[: index + 1]]:
                alone = self._ask([*prompt, *forced[:index]], 1, logprobs=MAX_LOGPROBS)
                gap = _larger_gap(again.logprobs[index], alone.logprobs[0], chosen, other)
            near_tie = gap is not None and tolerance > 0 and gap <= tolerance
            partings.append(Parting(index, chosen, other, gap, near_tie))
        return partings

    def _ask(self, prompt: Sequence[int], num_output: int, logprobs: int | None = None) -> _Answer:
        params = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True, logprobs=logprobs)
        request = GenerateRequest(request_id=f"bench-{next(self._ids)}", prompt_token_ids=list(prompt), params=params)
        answer = _Answer()
        before = time.perf_counter()
        stream = self._client.submit(request)
        while not stream.complete:
            step = self._client.step()
            now = time.perf_counter()
            answer.num_computed += step.stats.num_scheduled_tokens if step is not None else 0
            for output in stream.take():
                if output.error is not None:
                    raise GenerationFailed(output.error)
                answer.num_from_prefix_cache = output.num_cached_tokens
                answer.token_ids += output.token_ids
                answer.token_seconds.append(now - before)
                answer.logprobs += output.logprobs or []
                before = now
        expected = len(prompt) + num_output - 1
        if answer.num_computed != expected or answer.num_from_prefix_cache:
            raise UncountedWork(
                f"the engine computed {answer.num_computed} tokens and took {answer.num_from_prefix_cache} from the "
                f"prefix cache, where {expected} and 0 were to be measured"
            )
        return answer


def _larger_gap(cached: TokenLogprobs, recomputed: TokenLogprobs, chosen: int, other: int) -> float | None:
    """How clearly each way preferred its own token; None if one does not even list the other's."""
    gaps = []
    for listed in (cached, recomputed):
        values = dict(zip(listed.token_ids, listed.logprobs, strict=True))
        if chosen not in values or other not in values:
            return None
        gaps.append(abs(values[chosen] - values[other]))
    return max(gaps)
