"""The engine process: receive, step, send, until the HTTP process says so or is gone.

Started as `python -P -m octavo.server.engine.worker FD LOG_LEVEL` with one end of a socket pair. The first frame is the
EngineConfig as JSON. Nothing of HTTP is imported here.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import signal
import socket
import sys
import time

from ..config import EngineConfig
from .core import EngineCore
from .execution import EngineFailure
from .messages import Abort, DownMessage, EngineDead, GenerateRequest, Shutdown, StepOutput
from .wire import Channel, ConnectionClosed

HEARTBEAT_S = 2.0

logger = logging.getLogger("octavo.engine")


def main(fd: int, log_level: str, started: float) -> int:
    """Serve the connection on file descriptor `fd`; returns the exit status. `started` is in seconds of the epoch."""
    # Ctrl-C reaches the whole foreground group; the HTTP process drains and then says Shutdown.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    channel = Channel(socket.socket(fileno=fd))
    try:
        frames: list[bytes] = []
        while not frames:
            frames = channel.receive_frames(60.0)
        core = _build(channel, EngineConfig.from_json(frames[0]), started)
        if core is None:
            return 1
        # What the libraries and the start have made lives as long as this process: a full pass of the garbage collector
        # over all of it would hold up a step for tenths of a second.
        gc.collect()
        gc.freeze()
        serve(core, channel)
    except ConnectionClosed:
        logger.info("the server has gone; the engine leaves")
    except EngineFailure as error:
        return _report_death(channel, str(error))
    except Exception as error:
        logger.exception("the engine failed")
        return _report_death(channel, f"{type(error).__name__}: {error}")
    return 0


def _build(channel: Channel, config: EngineConfig, started: float) -> EngineCore | None:
    # Imported here, so that a broken installation of torch is reported like any other failure to start.
    import msgspec

    try:
        from ...model.spec import ModelError
        from .startup import build_engine

        imports = time.time() - started
        try:
            core, ready = build_engine(config)
        except ModelError as error:
            _report_death(channel, str(error))
            return None
    except ImportError as error:
        _report_death(channel, f"the engine's libraries cannot be imported: {error}")
        return None
    channel.send(msgspec.structs.replace(ready, phases={"imports": imports, **ready.phases}))
    return core


class Outbox:
    """The output of the last step, sent when the next one has been launched: it wakes the HTTP process, and while that
    has its turn on this core, other threads go on with a step of decodes."""

    def __init__(self, core: EngineCore, channel: Channel) -> None:
        self._core = core
        self._channel = channel
        self._output: StepOutput | None = None

    def put(self, output: StepOutput) -> None:
        """Keep an output until `send`; there is none now."""
        self._output = output

    def send(self) -> None:
        """Send what there is. Raises ConnectionClosed when the peer has gone."""
        output, self._output = self._output, None
        if output is not None:
            started = time.perf_counter()
            self._channel.send(output)
            self._core.note_emitted(time.perf_counter() - started)


def serve(core: EngineCore, channel: Channel) -> None:
    """The loop. Waits while there is nothing to do, and gives a sign of life now and then."""
    channel.send(core.idle())  # the first one says how large the pool is
    outbox = Outbox(core, channel)
    try:
        while True:
            for message in channel.receive(0.0 if core.has_work else HEARTBEAT_S):
                if not _take(core, message):
                    return
            if core.has_work:
                outbox.put(core.step(outbox.send))
                if not core.has_work:
                    outbox.send()
            else:
                outbox.send()  # what was aborted may have been all that the next step was for
                channel.send(core.idle())
    finally:
        with contextlib.suppress(ConnectionClosed):
            outbox.send()


def _take(core: EngineCore, message: DownMessage) -> bool:
    """Hand one message to the core; False for the one that ends it all."""
    if isinstance(message, GenerateRequest):
        core.add(message)
    elif isinstance(message, Abort):
        core.abort(message.request_id, message.sample_index)
    elif isinstance(message, Shutdown):
        return False
    return True


def _report_death(channel: Channel, reason: str) -> int:
    try:
        channel.send(EngineDead(" ".join(reason.split())[:1000]))
    except ConnectionClosed:
        logger.error("the engine ends: %s", reason)
    return 1


if __name__ == "__main__":
    import psutil

    sys.exit(main(int(sys.argv[1]), sys.argv[2], psutil.Process().create_time()))
