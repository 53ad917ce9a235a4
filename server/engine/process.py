"""The engine in a process of its own: start it, talk to it, notice its death, start it again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time

from ..config import EngineConfig
from .client import EngineClient, EngineState
from .messages import DownMessage, EngineDead, EngineReady, Shutdown, StepOutput
from .wire import FrameBuffer, encode_frame, frame, up_decoder

logger = logging.getLogger("octavo.server")

_READ_BYTES = 1 << 18
_EXIT_GRACE_S = 5.0


class EngineProcess:
    """One engine process and this end of its socket."""

    def __init__(self, config: EngineConfig) -> None:
        """Starts the process; it loads the model while the caller goes on."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            # -P keeps the working directory off sys.path: run from a checkout, its top-level folders would
            # otherwise pass for installed packages.
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "octavo.server.engine.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self.socket = ours
        try:
            self.socket.sendall(frame(config.to_json()))
        except OSError as error:
            logger.error("the engine process did not start: %s", error)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def describe_exit(self) -> str:
        """Wait for the end of a process that has closed its socket; why it ended, as far as that is visible."""
        try:
            code = self._popen.wait(_EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            code = self._popen.wait()
        if code < 0:
            name = signal.Signals(-code).name if -code in signal.valid_signals() else str(-code)
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return f"engine process {self.pid} was ended by {name}{hint}"
        return f"engine process {self.pid} exited with status {code}"

    def stop(self) -> None:
        """Make sure that it is gone, politely first. Close the socket or send Shutdown before."""
        for step in (None, signal.SIGTERM, signal.SIGKILL):
            if step is not None:
                self._popen.send_signal(step)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(_EXIT_GRACE_S)
                return


class ProcessClient(EngineClient):
    """Talks to an engine process, and starts another when it dies.

    An engine that dies before it was ever ready is not started again: its reason (a missing file, too little
    memory) would only repeat.
    """

    def __init__(self, config: EngineConfig, *, max_restarts: int = 3, process: EngineProcess | None = None) -> None:
        """`process` is one that was started ahead, while this process was still importing."""
        super().__init__()
        self._config = config
        self._max_restarts = max_restarts
        self._process = process
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._failures_in_a_row = 0
        self.spawned_at = time.time()

    @property
    def engine_pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise(), name="octavo-engine-supervisor")

    async def close(self) -> None:
        if self.state is EngineState.CLOSED:
            return
        if self._writer is not None:
            with contextlib.suppress(OSError, RuntimeError):
                self._writer.write(encode_frame(Shutdown()))
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._engine_died("the server is shutting down", EngineState.CLOSED)
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            self._process.socket.close()
            await asyncio.to_thread(self._process.stop)

    def _send(self, message: DownMessage) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    async def _supervise(self) -> None:
        """Run engines one after another until one may not be replaced."""
        while True:
            if self._process is None:
                self._process = EngineProcess(self._config)
            self.last_message_at = time.monotonic()
            was_ready, reason = await self._serve_connection(self._process)
            may_restart = was_ready and self._failures_in_a_row < self._max_restarts
            if not may_restart:
                self._engine_died(reason, EngineState.DEAD)
                return
            self._failures_in_a_row += 1
            self.num_restarts += 1
            # Open requests must learn of it before anything else is waited for.
            self._engine_died(reason, EngineState.STARTING)
            logger.error("%s; starting another (%d of %d)", reason, self._failures_in_a_row, self._max_restarts)
            self._process.socket.close()
            self._process = None

    async def _serve_connection(self, process: EngineProcess) -> tuple[bool, str]:
        """Route messages until the engine's end closes; whether it had been ready, and why it ended."""
        process.socket.setblocking(False)
        reader, self._writer = await asyncio.open_unix_connection(sock=process.socket)
        buffer = FrameBuffer()
        was_ready, reason = False, None
        while data := await _read(reader):
            for payload in buffer.feed(data):
                message = up_decoder.decode(payload)
                if isinstance(message, EngineDead):
                    reason = message.reason
                    continue
                was_ready = was_ready or isinstance(message, EngineReady)
                if isinstance(message, StepOutput) and message.outputs:
                    self._failures_in_a_row = 0
                self.handle(message)
        # The streams end now, not when the process has been reaped.
        if was_ready:
            self._engine_died(reason or "the engine process ended", EngineState.STARTING)
        self._writer.close()
        exit_text = await asyncio.to_thread(process.describe_exit)
        return was_ready, reason or exit_text


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(_READ_BYTES)
    except ConnectionError:
        return b""


def process_age_s() -> float:
    """Seconds since this process was started, imports included."""
    import psutil

    return time.time() - float(psutil.Process(os.getpid()).create_time())
