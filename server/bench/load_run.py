"""Runs a load: who sends what when, level after level, and two servers in turns."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .load_client import Record
from .load_probe import Target
from .load_settings import ClosedLoop, Level, OpenLoop, Settings
from .load_stats import Round
from .load_workload import FilePrompt, PlannedRequest, file_requests, poisson_arrivals, random_requests

HEARTBEAT_S = 0.02


@dataclass(frozen=True, slots=True)
class Clock:
    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request whose body is made: nothing is left to do when its time comes but to send it."""

    request: PlannedRequest
    body: bytes


Send = Callable[[Prepared, float | None], Awaitable[Record]]
"""Sends a request that was due at that time (None: now), and returns its record."""


class Progress(Protocol):
    """Told what happens; everything is shown by others."""

    def begin_round(self, title: str, num_requests: int | None, duration_s: float | None) -> None: ...

    def finished(self, record: Record) -> None: ...

    def end_round(self, round_: Round) -> None: ...


async def closed_loop(
    requests: Iterator[Prepared], concurrency: int, send: Send, done: Callable[[Record], None], *, clock: Clock,
    stop_at_s: float | None,
) -> None:  # fmt: skip
    """Keep `concurrency` requests open until `requests` or the time have run out; then wait for those under way."""

    async def worker() -> None:
        while stop_at_s is None or clock.now() < stop_at_s:
            prepared = next(requests, None)
            if prepared is None:
                return
            done(await send(prepared, None))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())


async def open_loop(
    requests: Iterator[Prepared], due_times_s: Sequence[float], max_concurrency: int | None, send: Send,
    done: Callable[[Record], None], *, clock: Clock, lagged: Callable[[float], None],
) -> None:  # fmt: skip
    """Send each request when it is due, however many are open; then wait for those under way.

    `lagged` hears how many seconds late each was.
    """
    slots = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()

    async def one(prepared: Prepared, due_s: float) -> None:
        lagged(max(0.0, clock.now() - due_s))
        async with slots:
            done(await send(prepared, due_s))

    async with asyncio.TaskGroup() as group:
        for due_s, prepared in zip(due_times_s, requests, strict=False):
            if (wait_s := due_s - clock.now()) > 0:
                await clock.sleep(wait_s)
            group.create_task(one(prepared, due_s))


@dataclass(slots=True)
class LevelResult:
    level: Level
    rounds: list[list[Round]]
    """Of each server, in order of time."""

    @property
    def num_complete_rounds(self) -> int:
        """That every server has finished."""
        return min(sum(not round_.num_cancelled and round_.end_s > 0 for round_ in rounds) for rounds in self.rounds)


@dataclass(slots=True)
class Run:
    """One run over all levels. `results` grows as it goes, so that an interrupted run still has something to show."""

    settings: Settings
    targets: Sequence[Target]
    progress: Progress
    prompts: Sequence[FilePrompt] = ()
    """Those of the file; none: random words."""
    clock: Clock = field(default_factory=Clock)
    results: list[LevelResult] = field(default_factory=list)
    _file_start: int = 0
    """Prompts of the file before the first of the present round: the same for each server, so that all get the same
    prompts in a round, however many of them they finish."""
    _num_taken: int = 0
    """Prompts of the file that any server has had."""

    async def run(self) -> None:
        """Everything. When it is cancelled, what has been measured stays in `results`."""
        for side in range(len(self.targets)):
            await self._warm_up(side)
        for number, level in enumerate(self.settings.levels):
            result = LevelResult(level, [[] for _ in self.targets])
            self.results.append(result)
            for round_number, sides in enumerate(turns(len(self.targets), self.settings.rounds)):
                self._file_start = self._num_taken
                for side in sides:
                    await self._round(result, side, f"{number}/{round_number}")

    async def _warm_up(self, side: int) -> None:
        """Requests that nobody counts: the first ones compile kernels, fill pools and open connections."""
        num_requests = self.settings.num_warmup
        if num_requests:
            widest = max(
                (level.concurrency for level in self.settings.levels if isinstance(level, ClosedLoop)), default=8
            )
            await self._play(ClosedLoop(min(num_requests, widest)), side, "warm-up", "warm-up", num_requests, None, [])

    async def _round(self, result: LevelResult, side: int, scope: str) -> None:
        level, settings = result.level, self.settings
        title = level.label
        if len(self.targets) > 1 or settings.rounds > 1:
            name = f"{'AB'[side]} " if len(self.targets) > 1 else ""
            title = f"{name}{title}, round {len(result.rounds[side]) + 1}/{settings.rounds}"
        await self._play(
            level, side, title, scope, settings.num_requests_of(level), settings.duration_s, result.rounds[side]
        )

    async def _play(
        self, level: Level, side: int, title: str, scope: str, num_requests: int | None, duration_s: float | None,
        rounds: list[Round],
    ) -> None:  # fmt: skip
        """One level on one server; the round is in `rounds` from its start on."""
        client = self.targets[side].client
        due_s: list[float] = []
        if isinstance(level, OpenLoop):
            rng = random.Random(f"{self.settings.seed}/{scope}/arrivals")
            due_s = poisson_arrivals(level.rate_per_s, rng, num_requests=num_requests, duration_s=duration_s)
            num_requests = len(due_s)
        requests = self._requests(side, scope, num_requests)
        self.progress.begin_round(title, num_requests, duration_s)
        round_ = Round(self.clock.now())
        rounds.append(round_)

        async def send(prepared: Prepared, intended_s: float | None) -> Record:
            round_.num_cancelled += 1
            record = await client.send(prepared.request, prepared.body, intended_s)
            round_.num_cancelled -= 1
            return record

        def done(record: Record) -> None:
            round_.records.append(record)
            self.progress.finished(record)

        cpu_s = time.process_time()
        try:
            async with self._heartbeat(round_.loop_lags_s):
                if isinstance(level, ClosedLoop):
                    stop_at_s = None if duration_s is None else round_.start_s + duration_s
                    await closed_loop(requests, level.concurrency, send, done, clock=self.clock, stop_at_s=stop_at_s)
                else:
                    due_s = [round_.start_s + after_s for after_s in due_s]
                    await open_loop(
                        requests, due_s, level.max_concurrency, send, done, clock=self.clock,
                        lagged=round_.send_lags_s.append,
                    )  # fmt: skip
        finally:
            round_.end_s = self.clock.now()
            round_.client_cpu_s = time.process_time() - cpu_s
            self.progress.end_round(round_)

    def _requests(self, side: int, scope: str, num_requests: int | None) -> Iterator[Prepared]:
        """Made before the round starts if their number is known, else one by one."""
        settings, target = self.settings, self.targets[side]
        if self.prompts:
            planned = file_requests(
                self.prompts,
                start=self._file_start,
                seed=settings.seed,
                scope=scope,
                output_tokens=settings.output_tokens,
            )
        else:
            if side and settings.compare_url == settings.base_url:
                scope += "/again"  # a server against itself: the same prompts would be found in its cache
            planned = random_requests(
                target.maker,
                seed=settings.seed,
                scope=scope,
                input_tokens=settings.input_tokens,
                output_tokens=settings.output_tokens,
                shared_prefix=settings.shared_prefix,
                chat=settings.endpoint == "chat",
            )
        prepared = (Prepared(request, target.client.body(request)) for request in planned)
        counted = self._count(prepared)
        return counted if num_requests is None else iter(list(itertools.islice(counted, num_requests)))

    def _count(self, prepared: Iterator[Prepared]) -> Iterator[Prepared]:
        for number, request in enumerate(prepared, start=self._file_start + 1):
            self._num_taken = max(self._num_taken, number)
            yield request

    @contextlib.asynccontextmanager
    async def _heartbeat(self, lags_s: list[float]) -> AsyncIterator[None]:
        """Samples how late the event loop wakes those who sleep on it: so late may every timestamp be."""

        async def beat() -> None:
            while True:
                due_s = time.perf_counter() + HEARTBEAT_S
                await asyncio.sleep(HEARTBEAT_S)
                lags_s.append(max(0.0, time.perf_counter() - due_s))

        task = asyncio.create_task(beat())
        try:
            yield
        finally:
            task.cancel()


def turns(num_servers: int, num_rounds: int) -> list[list[int]]:
    """Who goes when: A B, then B A, then A B …, so that what drifts over time hits both alike."""
    order = list(range(num_servers))
    return [order if number % 2 == 0 else order[::-1] for number in range(num_rounds)]
