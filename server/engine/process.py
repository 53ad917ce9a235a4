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
from .messages import DownMessage, EngineDead, Shutdown, StepOutput
from .wire import FrameBuffer, encode_frame, frame, up_decoder

logger = logging.getLogger("octavo.server")

_READ_BYTES = 1 << 18
_EXIT_GRACE_S = 5.0
_BACKOFF_S = 1.0


class EngineProcess:
    """One engine process and this end of its socket."""

    def __init__(self, config: EngineConfig, log_level: str = "info") -> None:
        """Starts the process; it loads the model while the caller goes on."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            # -P keeps the working directory off sys.path: run from a checkout, its top-level folders would
            # otherwise pass for installed packages.
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "octavo.server.engine.worker", str(theirs.fileno()), log_level],
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

    def stop(self, grace_s: float) -> None:
        """Make sure that it is gone. With its socket closed, a loop that still turns leaves by itself; one that is
        loading, or hangs, does not look, and ignores softer signals as it must ignore Ctrl-C."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(grace_s)
        if self._popen.poll() is None:
            self._popen.kill()
            self._popen.wait()


class ProcessClient(EngineClient):
    """Talks to an engine process, and starts another when it dies.

    An engine that dies when none was ever ready is not replaced: its reason (a missing file, too little memory)
    would only repeat.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        max_restarts: int = 3,
        process: EngineProcess | None = None,
        log_level: str = "info",
    ) -> None:
        """`process` is one that was started ahead, while this process was still importing."""
        super().__init__()
        self._config = config
        self._max_restarts = max_restarts
        self._log_level = log_level
        self._process = process
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._num_failures = 0
        """Since a token was last served."""

    @property
    def engine_pid(self) -> int | None:
        # Once it is given up it has been waited for, and its number may be another's.
        if self._process is None or self.state in (EngineState.DEAD, EngineState.CLOSED):
            return None
        return self._process.pid

    async def start(self) -> None:
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise(), name="octavo-engine-supervisor")

    async def close(self) -> None:
        if self.state is EngineState.CLOSED:
            return
        was_ready = self.state is EngineState.READY
        if self._writer is not None:
            with contextlib.suppress(OSError, RuntimeError):
                self._writer.write(encode_frame(Shutdown()))
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self._engine_died("the server is shutting down", EngineState.CLOSED)
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            self._process.socket.close()
            await asyncio.to_thread(self._process.stop, _EXIT_GRACE_S if was_ready else 0.0)

    def _send(self, message: DownMessage) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    async def _supervise(self) -> None:
        """Whatever goes wrong here, nobody is left waiting for an engine that nobody watches."""
        try:
            await self._run_engines()
        except Exception as error:
            logger.exception("the engine's supervisor failed")
            self._engine_died(f"supervising the engine failed: {type(error).__name__}: {error}")
            if self._process is not None:
                await asyncio.to_thread(self._process.stop, 0.0)

    async def _run_engines(self) -> None:
        """Run engines one after another until one may not be replaced."""
        while True:
            if self._process is None:
                self._process = EngineProcess(self._config, self._log_level)
            self.last_message_at = time.monotonic()
            reason = await self._serve_connection(self._process)
            if self.ready is None or self._num_failures >= self._max_restarts:
                self._engine_died(reason)
                return
            self._num_failures += 1
            self.num_restarts += 1
            self._engine_died(reason, EngineState.STARTING)
            logger.error("%s; starting another (%d of %d)", reason, self._num_failures, self._max_restarts)
            self._process = None
            # The first one at once; later ones give whatever is wrong some time to pass.
            await asyncio.sleep(_BACKOFF_S * (self._num_failures - 1))

    async def _serve_connection(self, process: EngineProcess) -> str:
        """Route messages until the engine ends; why it did."""
        process.socket.setblocking(False)
        reader, self._writer = await asyncio.open_unix_connection(sock=process.socket)
        reason: str | None
        try:
            reason = await self._route(reader)
        except Exception as error:
            logger.exception("reading from the engine failed")
            reason = f"reading from the engine failed: {type(error).__name__}"
        # Open requests end now, before the process is waited for: it may hang while it dies.
        self._engine_died(reason or "the engine process ended", EngineState.STARTING)
        self._writer.close()
        exit_text = await asyncio.to_thread(process.describe_exit)
        return reason or exit_text

    async def _route(self, reader: asyncio.StreamReader) -> str | None:
        """Handle messages until the last; the engine's own word on why it ends, if it had one."""
        buffer = FrameBuffer()
        while data := await _read(reader):
            for payload in buffer.feed(data):
                message = up_decoder.decode(payload)
                if isinstance(message, EngineDead):
                    return message.reason
                if isinstance(message, StepOutput) and message.outputs:
                    self._num_failures = 0
                self.handle(message)
        return None


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(_READ_BYTES)
    except ConnectionError:
        return b""


def process_age_s() -> float:
    """Seconds since this process was started, imports included."""
    import psutil

    return time.time() - float(psutil.Process(os.getpid()).create_time())
