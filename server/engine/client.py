"""The HTTP process's view of an engine: submit requests, read their outputs, learn of its death.

`EngineClient` holds everything that does not depend on where the engine runs; `ProcessClient` (process.py) talks to
an engine process, `InlineClient` (inline.py) runs the same core in this one.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

from .admission import check_request
from .messages import (
    Abort,
    DownMessage,
    EngineDead,
    EngineReady,
    GenerateRequest,
    RequestError,
    StepOutput,
    StepStats,
    TokenOutput,
    UpMessage,
)

logger = logging.getLogger("octavo.server")


class EngineState(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"
    CLOSED = "closed"


class EngineUnavailable(Exception):
    """No engine can take this request now: it is starting, restarting, draining or gone for good."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestStream:
    """The outputs of one request, in order. Ends when every sample has had its finishing output."""

    def __init__(self, request_id: str, num_samples: int) -> None:
        self.request_id = request_id
        self._num_open_samples = num_samples
        self._outputs: deque[TokenOutput] = deque()
        self._arrived = asyncio.Event()

    @property
    def finished(self) -> bool:
        """Every sample has ended, and nothing is left to read."""
        return self._num_open_samples == 0 and not self._outputs

    @property
    def complete(self) -> bool:
        """Every sample has ended; there may be outputs left to read."""
        return self._num_open_samples == 0

    def put(self, output: TokenOutput) -> None:
        """Called by the client, on the event loop's thread."""
        if output.error is not None:
            self._num_open_samples = 0  # an error ends the whole request, all its samples
        elif output.finish_reason is not None:
            self._num_open_samples -= 1
        self._outputs.append(output)
        self._arrived.set()

    def fail(self, error: RequestError) -> None:
        """End the whole request with an error; what had arrived before it can still be read."""
        if self._num_open_samples > 0:
            self._num_open_samples = 0
            self._outputs.append(TokenOutput(request_id=self.request_id, finish_reason="error", error=error))
        self._arrived.set()

    def take(self) -> list[TokenOutput]:
        """All outputs that have arrived, without waiting."""
        outputs = list(self._outputs)
        self._outputs.clear()
        self._arrived.clear()
        return outputs

    async def next(self) -> list[TokenOutput]:
        """All outputs that have arrived, waiting for the first; empty only once `finished`."""
        if not self._outputs and self._num_open_samples > 0:
            await self._arrived.wait()
        return self.take()


class EngineClient(ABC):
    """Bookkeeping of open requests over some transport. Not thread-safe: use it on one event loop."""

    def __init__(self) -> None:
        self.state = EngineState.STARTING
        self.ready: EngineReady | None = None
        """What the engine derived at start; kept while it restarts."""
        self.dead_reason: str | None = None
        self.last_message_at = time.monotonic()
        self.stats_listeners: list[Callable[[StepStats], None]] = []
        self.num_restarts = 0
        self._streams: dict[str, RequestStream] = {}
        self._state_changed = asyncio.Event()

    @abstractmethod
    async def start(self) -> None:
        """Begin starting the engine; returns before it is ready."""

    @abstractmethod
    async def close(self) -> None:
        """Stop the engine; open requests end with an error. Idempotent."""

    @abstractmethod
    def _send(self, message: DownMessage) -> None: ...

    @property
    def engine_pid(self) -> int | None:
        """The process that the engine runs in, None while there is none."""
        return None

    @property
    def num_open_requests(self) -> int:
        return len(self._streams)

    async def wait_while(self, *states: EngineState) -> EngineState:
        """Wait until the engine is in none of `states`; returns the one it is in."""
        while self.state in states:
            self._state_changed.clear()
            await self._state_changed.wait()
        return self.state

    async def wait_ready(self) -> EngineReady:
        """Wait until the engine serves; raises EngineUnavailable if it died for good or was closed instead."""
        await self.wait_while(EngineState.STARTING)
        if self.state is not EngineState.READY or self.ready is None:
            raise EngineUnavailable(self.dead_reason or "the engine was closed")
        return self.ready

    def submit(self, request: GenerateRequest) -> RequestStream:
        """Send a request. Raises InvalidRequest if it can never be served, EngineUnavailable if not now."""
        if self.state is not EngineState.READY or self.ready is None:
            raise EngineUnavailable(f"the engine is {self.state.value}", retry_after_s=5)
        check_request(request, self.ready)
        if request.request_id in self._streams:
            raise ValueError(f"request id {request.request_id} is already in use")
        self._send(request)
        stream = self._streams[request.request_id] = RequestStream(request.request_id, request.params.n)
        return stream

    def abort(self, request_id: str, sample_index: int | None = None) -> None:
        """Stop a request, or one sample of it. Its stream gets nothing more for what was aborted; the caller
        has left or knows the end already. Unknown and finished requests are ignored."""
        stream = self._streams.get(request_id)
        if stream is None:
            return
        if sample_index is None:
            del self._streams[request_id]
        self._send(Abort(request_id, sample_index))

    def release(self, request_id: str) -> None:
        """The reader is done with this request: forget it, and abort whatever of it still runs."""
        stream = self._streams.get(request_id)
        if stream is not None and not stream.complete:
            self.abort(request_id)
        self._streams.pop(request_id, None)

    def handle(self, message: UpMessage) -> None:
        """Route one message from the engine. Called by the transport, on the event loop's thread."""
        self.last_message_at = time.monotonic()
        if isinstance(message, StepOutput):
            for output in message.outputs:
                stream = self._streams.get(output.request_id)
                if stream is None:
                    continue
                stream.put(output)
                if stream.complete:
                    del self._streams[output.request_id]
            for listener in self.stats_listeners:
                self._tell(listener, message.stats)
        elif isinstance(message, EngineReady):
            self.ready = message
            self._set_state(EngineState.READY)
        elif isinstance(message, EngineDead):
            self._engine_died(message.reason)

    def _tell(self, listener: Callable[[StepStats], None], stats: StepStats) -> None:
        try:
            listener(stats)
        except Exception:
            logger.exception("a listener to the engine's statistics failed")

    def _engine_died(self, reason: str, state: EngineState = EngineState.DEAD) -> None:
        """Every open request ends with an error; `state` says whether another engine is on its way."""
        self.dead_reason = reason
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(RequestError(code="engine_dead", message=reason))
        for listener in self.stats_listeners:
            self._tell(listener, StepStats())  # nothing runs in an engine that is not there
        self._set_state(state)

    def _set_state(self, state: EngineState) -> None:
        self.state = state
        self._state_changed.set()
