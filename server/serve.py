"""Run the HTTP server around an engine process: banner, signals, drain, exit status."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from types import FrameType

import uvicorn

from ..model.weights.generation import read_generation_defaults
from ..model.weights.resolve import ModelFiles
from .app import create_app
from .banner import banner
from .config import ServerConfig
from .engine.client import EngineState
from .engine.process import EngineProcess, ProcessClient, process_age_s
from .state import ServerState
from .tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger("octavo.server")

_DRAIN_POLL_S = 0.05
_CLOSE_CONNECTIONS_S = 3


class DrainingServer(uvicorn.Server):
    """A uvicorn server that, told to stop, first lets open requests finish.

    It keeps listening meanwhile, so that /ready and new requests get an answer (503, Retry-After) instead of a
    refused connection. The deadline, or a second signal, ends what is still open with an error; a third
    ends the server at once.
    """

    def __init__(self, config: uvicorn.Config, state: ServerState, timeout_s: float) -> None:
        super().__init__(config)
        self._state = state
        self._timeout_s = timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self._hurry = False
        self.fatal_reason: str | None = None
        """Why no engine will serve any more, if that is what ended the server."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's signal handler. Not recorded as uvicorn would: a drained server exits with status 0."""
        if self._loop is None:
            self.should_exit = True
            return
        if self._state.draining:
            self.force_exit = self._hurry
            self._hurry = True
            return
        self._state.draining = True
        self._loop.call_soon_threadsafe(self._start_drain, signal.Signals(sig).name)

    def _start_drain(self, name: str) -> None:
        count = self._state.num_open_generations
        logger.info("%s: finishing %d open requests (again to end them now)", name, count)
        self._drain = asyncio.create_task(self._finish())

    async def _finish(self) -> None:
        try:
            await self._wait_for_responses()
            await self._state.client.close()
        finally:
            self.should_exit = True

    async def _wait_for_responses(self) -> None:
        """Until every answer is delivered, the deadline has passed, or somebody is in a hurry."""
        deadline = time.monotonic() + self._timeout_s
        while self._state.num_open_generations and time.monotonic() < deadline and not self._hurry:  # noqa: ASYNC110 - one is a clock
            await asyncio.sleep(_DRAIN_POLL_S)


def serve(config: ServerConfig, files: ModelFiles, process: EngineProcess, listener: socket.socket) -> int:
    """Serve until a signal or the engine's final death; returns the exit status. Raises ModelError."""
    tokenizer = load_tokenizer(files)
    defaults = read_generation_defaults(files) if config.use_generation_config else {}
    # uvicorn runs the app on the loop that asyncio.run makes, so its own choice of loop does not apply.
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(config, files, tokenizer, defaults, process, listener))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _serve(
    config: ServerConfig,
    files: ModelFiles,
    tokenizer: Tokenizer,
    defaults: Mapping[str, float],
    process: EngineProcess,
    listener: socket.socket,
) -> int:
    client = ProcessClient(
        config.engine, max_restarts=config.max_engine_restarts, process=process, log_level=config.log_level
    )
    app = create_app(client, config, tokenizer, defaults)
    uvicorn_config = uvicorn.Config(
        app,
        log_level="warning" if config.log_level == "info" else config.log_level,
        access_log=config.log_level == "debug",
        timeout_graceful_shutdown=_CLOSE_CONNECTIONS_S,
        server_header=False,
    )
    server = DrainingServer(uvicorn_config, app.state.server, config.shutdown_timeout_s)
    chats = tokenizer.chat_template is not None
    watcher = asyncio.create_task(_watch(config, files, client, listener, server, chats))
    await server.serve(sockets=[listener])
    watcher.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watcher
    if server.fatal_reason is not None:
        print(f"octavo: {server.fatal_reason}", file=sys.stderr)
        return 1
    return 0


async def _watch(
    config: ServerConfig,
    files: ModelFiles,
    client: ProcessClient,
    listener: socket.socket,
    server: DrainingServer,
    chats: bool,
) -> None:
    """Say when it is ready, and stop serving when no engine will come any more."""
    _keep_what_there_is()
    if await client.wait_while(EngineState.STARTING) is EngineState.READY:
        seconds = process_age_s()
        ready = await client.wait_ready()
        # A closed or narrow standard output must not end the watch below.
        with contextlib.suppress(OSError, ValueError):
            print(banner(config, files, ready, listener.getsockname(), seconds, chats=chats), flush=True)
        await client.wait_while(EngineState.READY, EngineState.STARTING)
    if client.state is EngineState.DEAD:
        server.fatal_reason = client.dead_reason
        server.should_exit = True


def _keep_what_there_is() -> None:
    """What imports have made lives as long as this process. A full pass of the garbage collector over all of it held up
    every stream for up to 90 ms, now and then. While the engine loads nobody waits for this one."""
    gc.collect()
    gc.freeze()
