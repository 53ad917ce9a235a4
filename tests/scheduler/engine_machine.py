"""Random requests, aborts and failures against scheduler, block manager and engine core, over an oracle of the pools.

Tiny pools and a tiny alphabet make sharing, eviction, preemption and copy-on-write happen all the time. What the
metrics are told is checked as well: see watched_scheduler.py, and `counters_add_up` here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from octavo.block_manager import check as invariants
from octavo.block_manager.config import PoolConfig
from octavo.scheduler.config import CacheConfig, SchedulerConfig
from octavo.scheduler.request import RequestStatus, derive_seed
from octavo.scheduler.sampling_params import SamplingParams
from octavo.server.engine.core import EngineCore
from octavo.server.engine.messages import GenerateRequest, StepStats, TokenOutput
from oracle_runner import ALPHABET, OracleRunner, next_token
from watched_scheduler import WatchedScheduler, blocks_of_window, require

COUNTED = (
    *("prefix_cache_queries", "prefix_cache_hits", "prefix_misses_new", "prefix_misses_evicted"),
    *("prefix_misses_tail", "num_evicted_blocks"),
)
EOS = 0
ALWAYS_AHEAD = False
"""Whether every machine's runner runs ahead: for the search of a bug that no other shows."""


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[PoolConfig], int]:
    """A block size, pools for some layer groups, and the longest sequence that they hold."""
    block_size = draw(st.integers(2, 4))
    kinds = [[None], [None], [None, 1], [1], [None, 1, 1]]  # 1: some window
    windows = [kind and draw(st.integers(1, 11)) for kind in draw(st.sampled_from(kinds))]
    num_blocks = draw(st.integers(3, 11))
    capacity = num_blocks * block_size
    pools = []
    for window in windows:
        least = num_blocks if window is None else min(num_blocks, blocks_of_window(window, block_size))
        more = 0 if window is None else draw(st.integers(0, 5))
        pools.append(PoolConfig(least + more + 1, window))
    return block_size, pools, capacity


@dataclass
class Submitted:
    """What the machine knows of a request it sent."""

    request: GenerateRequest
    max_total: int
    outputs: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    error: str | None = None
    gone: set[int] = field(default_factory=set)
    """Samples that were aborted."""

    def expected(self, seed: int, sample: int) -> tuple[list[int], str]:
        params = self.request.params
        tokens = list(self.request.prompt_token_ids)
        output: list[int] = []
        while True:
            token = next_token(tokens, derive_seed(seed, sample))
            tokens.append(token)
            output.append(token)
            stops = token in params.stop_token_ids or (token == EOS and not params.ignore_eos)
            if len(output) >= params.min_tokens and stops:
                return output, "stop"
            if len(tokens) >= self.max_total:
                return output, "length"


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        layout=layouts(),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(1, 9),
        caching=st.booleans(),
        max_waiting=st.integers(0, 6),
        runs_ahead=st.booleans().map(lambda ahead: ahead or ALWAYS_AHEAD),
    )
    def start(
        self,
        layout: tuple[int, list[PoolConfig], int],
        max_num_seqs: int,
        budget: int,
        caching: bool,
        max_waiting: int,
        runs_ahead: bool,
    ) -> None:
        block_size, pools, self.capacity = layout
        self.max_waiting, self.max_num_seqs = max_waiting, max_num_seqs
        self.runner = OracleRunner(block_size, [pool.window for pool in pools], runs_ahead)
        self.scheduler = WatchedScheduler(
            SchedulerConfig(max_num_seqs=max_num_seqs, max_num_waiting=max_waiting),
            CacheConfig(block_size=block_size, enable_prefix_caching=caching),
            pools=pools,
            max_model_len=self.capacity,
            max_num_batched_tokens=budget,
            eos_token_ids=(EOS,),
        )
        self.runner.manager = self.scheduler.blocks
        self.runner.budget = budget
        self.core = EngineCore(self.scheduler, self.runner)
        self.sent: dict[str, Submitted] = {}
        self.work = 0
        self.reported = dict.fromkeys(COUNTED, 0)

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        prompts = st.lists(st.integers(0, ALPHABET - 1), min_size=1, max_size=self.capacity)
        if self.sent:  # what was evicted is asked for again
            prompts |= st.sampled_from([sent.request.prompt_token_ids for sent in self.sent.values()])
        prompt = data.draw(prompts, label="prompt")
        max_tokens = data.draw(st.none() | st.integers(1, self.capacity), label="max_tokens")
        params = SamplingParams(
            n=data.draw(st.sampled_from([1, 1, 1, 2, 3]), label="n"),
            seed=data.draw(st.integers(0, 3), label="seed"),
            max_tokens=max_tokens,
            min_tokens=data.draw(st.integers(0, 3 if max_tokens is None else min(3, max_tokens)), label="min"),
            ignore_eos=data.draw(st.booleans(), label="ignore_eos"),
            stop_token_ids=data.draw(st.sampled_from([(), (), (1,)]), label="stop"),
        )
        request = GenerateRequest(
            request_id=f"r{len(self.sent)}",
            prompt_token_ids=prompt,
            params=params,
            priority=data.draw(st.integers(0, 1), label="priority"),
            cache_salt=data.draw(st.sampled_from(["", "", "other"]), label="salt"),
        )
        max_total = min(self.capacity, len(prompt) + (max_tokens or self.capacity))
        self.sent[request.request_id] = Submitted(request, max_total)
        self.runner.salts[request.request_id] = request.cache_salt
        self.work += params.n * max_total
        self.core.add(request)

    @rule()
    def step(self) -> None:
        if self.core.has_work:
            had_rows = self.scheduler.has_work
            output = self.core.step()
            require(output.stats.num_scheduled_tokens > 0 or not had_rows, "a step with work did nothing")
            self.count(output.stats)
            for token_output in output.outputs:
                self.take(token_output)

    def count(self, stats: StepStats) -> None:
        for name in self.reported:
            self.reported[name] += getattr(stats, name)
        require(0 <= stats.num_waiting_deferred <= stats.num_waiting, "more are deferred than wait")

    @precondition(lambda self: getattr(self, "scheduler", None) and self.scheduler.requests)
    @rule(data=st.data(), whole=st.booleans())
    def abort(self, data: st.DataObject, whole: bool) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.scheduler.requests)), label="request")
        samples = self.scheduler.requests[request_id]
        sample = None if whole else data.draw(st.sampled_from(sorted(samples)), label="sample")
        self.sent[request_id].gone.update(list(samples) if sample is None else [sample])
        self.core.abort(request_id, sample)

    @precondition(lambda self: getattr(self, "scheduler", None) and self.scheduler.requests)
    @rule(data=st.data())
    def poison(self, data: st.DataObject) -> None:
        self.runner.poisoned.add(data.draw(st.sampled_from(sorted(self.scheduler.requests)), label="request"))

    def take(self, output: TokenOutput) -> None:
        sent = self.sent[output.request_id]
        if output.error is not None:
            require(sent.error is None, "a request failed twice")
            sent.error = output.error.code
            if sent.error == "internal_error":
                require(output.request_id in self.runner.poisoned, "an innocent request was blamed")
            return
        require(sent.error is None, "output after an error")
        require(output.sample_index not in sent.gone, "output after an abort")
        require(output.sample_index not in sent.ends, "output after the end")
        sent.outputs.setdefault(output.sample_index, []).extend(output.token_ids)
        if output.finish_reason is not None:
            sent.ends[output.sample_index] = output.finish_reason

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        invariants.check(scheduler.blocks)
        live = [request for samples in scheduler.requests.values() for request in samples.values()]
        running = [request.seq_id for request in live if request.status is RequestStatus.RUNNING]
        require(sorted(running) == sorted(r.seq_id for r in scheduler.running), "the running list is off")
        require(len(set(running)) == len(running) <= self.max_num_seqs, "too many are running")
        require(set(scheduler.blocks.tables) == set(running), "blocks are held by a sequence that does not run")
        waiting = {request.seq_id for request in live if request.status is RequestStatus.WAITING}
        require(waiting == {request.seq_id for request in scheduler.waiting}, "the waiting queue is off")
        held = [request for request in live if request.status is RequestStatus.HELD]
        require(scheduler.num_waiting == len(waiting) + len(held), "the count of waiting sequences is off")
        require(not any(request.status is RequestStatus.FINISHED for request in live), "a finished request lives on")

    @invariant()
    def counters_add_up(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        told, counters = self.reported, self.scheduler.counters
        misses = told["prefix_misses_new"] + told["prefix_misses_evicted"] + told["prefix_misses_tail"]
        require(
            told["prefix_cache_queries"] == told["prefix_cache_hits"] + misses, "hits and misses are not all queries"
        )
        require(told["prefix_cache_queries"] == self.scheduler.num_queries, "the queries are not the prompts admitted")
        for name in COUNTED[:-1]:
            require(told[name] == getattr(counters, name), f"{name} is reported twice, or not at all")
        require(
            told["num_evicted_blocks"] == self.scheduler.blocks.counts().num_evicted, "evictions are not all reported"
        )

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        # Under FCFS somebody always advances; recomputation is the only work beyond what was asked for.
        for _ in range(20 + 20 * self.work):
            if not self.core.has_work:
                break
            self.step()
            self.books_balance()
            self.counters_add_up()
        require(not self.core.has_work, "requests are not served within the bound")
        self.core.idle()
        counts = self.scheduler.blocks.counts()
        require(counts.num_free == counts.num_usable, "blocks are lost")
        require(not self.scheduler.requests and not self.scheduler.running, "requests are left over")
        require(not self.runner.known, "the runner keeps state of ended sequences")
        arrival = 0
        for sent in self.sent.values():
            if sent.error != "queue_full":
                arrival += 1
            self.judge(sent)

    def judge(self, sent: Submitted) -> None:
        params = sent.request.params
        if sent.error is not None:
            require(sent.error in ("queue_full", "internal_error"), f"unexpected error {sent.error}")
            return
        assert params.seed is not None
        for sample in range(params.n):
            expected, reason = sent.expected(params.seed, sample)
            got = sent.outputs.get(sample, [])
            if sample in sent.gone:
                require(expected[: len(got)] == got, "an aborted sample had said something wrong")
                continue
            require(got == expected, f"{sent.request.request_id}/{sample} said {got} instead of {expected}")
            require(sent.ends.get(sample) == reason, "the finish reason is wrong")
