"""The same engine core in this process: for tests, the offline LLM class and debugging."""

from __future__ import annotations

import asyncio
import os

from .client import EngineClient, EngineState
from .core import EngineCore
from .messages import Abort, DownMessage, EngineReady, GenerateRequest, StepOutput


class InlineClient(EngineClient):
    """Drives a core either by hand (`step`, for synchronous callers) or in a task that `start` creates."""

    def __init__(self, core: EngineCore, ready: EngineReady) -> None:
        super().__init__()
        self.core = core
        self._inbox: list[DownMessage] = []
        self._wake = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None
        self.handle(ready)

    @property
    def engine_pid(self) -> int | None:
        return None if self.state is EngineState.CLOSED else os.getpid()

    async def start(self) -> None:
        if self._pump is None:
            self.handle(StepOutput(outputs=[], stats=self.core.stats()))  # says how large the pool is
            self._pump = asyncio.create_task(self._run(), name="octavo-inline-engine")

    async def close(self) -> None:
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
        self._engine_died("the client was closed", EngineState.CLOSED)

    def step(self) -> StepOutput | None:
        """Run one engine step and route what it produced, which is returned; None if there was nothing to do."""
        output = self._compute(self._take_inbox())
        if output is not None:
            self.handle(output)
        return output

    def _send(self, message: DownMessage) -> None:
        self._inbox.append(message)
        self._wake.set()

    def _take_inbox(self) -> list[DownMessage]:
        inbox, self._inbox = self._inbox, []
        return inbox

    def _compute(self, inbox: list[DownMessage]) -> StepOutput | None:
        for message in inbox:
            if isinstance(message, GenerateRequest):
                self.core.add(message)
            elif isinstance(message, Abort):
                self.core.abort(message.request_id, message.sample_index)
        if self.core.has_work:
            return self.core.step()
        return self.core.idle() if inbox else None

    async def _run(self) -> None:
        """Steps run in a thread, so that the event loop goes on serving, as it does with an engine process."""
        while True:
            try:
                output = await asyncio.to_thread(self._compute, self._take_inbox())
            except Exception as error:
                self._engine_died(f"{type(error).__name__}: {error}")
                raise
            if output is not None:
                self.handle(output)
            if not self._inbox and not self.core.has_work:
                self._wake.clear()
                await self._wake.wait()
