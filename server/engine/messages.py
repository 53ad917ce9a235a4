"""All that crosses the process boundary between the HTTP process and the engine process.

Typed msgspec structs, tagged by class name and keyed by field name; nothing here is ever pickled.
Times are seconds on the machine's monotonic clock, which both processes share.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from ...scheduler.batch import TokenLogprobs
from ...scheduler.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class GenerateRequest(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Down: continue this prompt. Answered by `TokenOutput`s, of which exactly one per sample finishes it, or one with
    an error all of them at once."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    """Lower is served earlier; equal priorities first come, first served."""
    cache_salt: str = ""
    """Prefix-cache blocks are shared only between equal salts."""
    arrival_time: float = 0.0


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Down: stop working for this request (or one sample of it). Nothing more is sent for what was aborted."""

    request_id: str
    sample_index: int | None = None


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Down: finish nothing more, leave."""


DownMessage = GenerateRequest | Abort | Shutdown


class RequestTimings(msgspec.Struct, frozen=True, kw_only=True):
    """When one sample passed each station."""

    arrival: float
    scheduled: float
    first_token: float
    last_token: float
    num_preemptions: int = 0


class RequestError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request ended without a result. `code` decides the HTTP status (see server/errors.py)."""

    code: Literal["invalid_request", "queue_full", "internal_error", "engine_dead"]
    message: str
    param: str | None = None
    """The field to blame, where one is known."""


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """New tokens of one sample. `token_ids` includes the stop token that ended it, if one did."""

    request_id: str
    sample_index: int = 0
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    """One entry per new token, when asked for."""
    finish_reason: FinishReason | None = None
    """Set on the last output of this sample."""
    stop_token_id: int | None = None
    """The eos or stop id that ended it; it is also the last of `token_ids`."""
    num_cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache. With the first output of a sample, and with the last."""
    timings: RequestTimings | None = None
    """With the first output of a sample (a stop string may end it without another), and with the last."""
    error: RequestError | None = None
    """With finish_reason "error": the whole request has ended, whatever its `sample_index`."""


class StepStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Plain numbers of one engine step: gauges as they are after it, counters as their increase in it."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_deferred: int = 0
    """Those of `num_waiting` that wait only for a step with tokens left; the others wait for a seat or blocks."""
    num_blocks: int = 0
    num_free_blocks: int = 0
    """Allocatable, cached ones included."""
    num_cached_blocks: int = 0
    """Free blocks that still hold a reusable prefix."""
    num_shared_blocks: int = 0
    """Blocks in more than one table."""
    block_usage: float = 0.0
    """Share of the fullest layer group's blocks that are in tables; of all blocks, where there is one group."""
    prefix_cache_queries: int = 0
    """In tokens; readmissions after a preemption are not counted."""
    prefix_cache_hits: int = 0
    prefix_misses_new: int = 0
    """In tokens, as the next two: never seen before. Hits and misses add up to the queries."""
    prefix_misses_evicted: int = 0
    """Seen, and evicted since."""
    prefix_misses_tail: int = 0
    """Beyond the last block that a hit may cover."""
    num_evicted_blocks: int = 0
    """Published blocks reused for other contents."""
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    """Tokens computed again because of a preemption."""
    num_prompt_tokens: int = 0
    """Prompt tokens computed in this step."""
    num_generation_tokens: int = 0
    num_scheduled_tokens: int = 0
    schedule_seconds: float = 0.0
    forward_seconds: float = 0.0
    sample_seconds: float = 0.0
    update_seconds: float = 0.0
    emit_seconds: float = 0.0
    """Of the step before: this one's message is not sent yet."""


class StepOutput(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Up: everything one step produced, in one message. Also sent without outputs, as a sign of life."""

    outputs: list[TokenOutput]
    stats: StepStats


class EngineReady(msgspec.Struct, tag=True, frozen=True, kw_only=True):
    """Up, once: the engine serves; what was derived at start."""

    max_model_len: int
    max_num_seqs: int
    max_num_waiting: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    """Of all pools together."""
    pool_blocks: list[int]
    """Of each layer group's pool: layers that keep everything first, then those with a window."""
    kv_cache_bytes: int
    weight_bytes: int
    vocab_size: int
    """Width of the logits."""
    eos_token_ids: list[int]
    prefix_caching: bool
    architecture: str
    dtype: str
    device: str
    backend: str
    phases: dict[str, float]
    """Name of each start-up phase → seconds, in order."""
    notes: list[str] = []
    """One line each: what was fitted or fell back, and why."""


class EngineDead(msgspec.Struct, tag=True, frozen=True):
    """Up, last: the engine cannot go on. `reason` is one line that says what to do, where that is known."""

    reason: str


UpMessage = EngineReady | StepOutput | EngineDead
