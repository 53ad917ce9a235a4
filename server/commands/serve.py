"""`octavo serve`: a model behind the OpenAI-compatible API."""

from __future__ import annotations

import argparse
import logging
import socket
from typing import TYPE_CHECKING

from ..options import OptionError, add_arguments, resolve_options, server_config

if TYPE_CHECKING:
    from . import Subcommands


def add_parser(commands: Subcommands) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve a model over the OpenAI-compatible API",
        description="Serve a model over the OpenAI-compatible API. Every setting can also be given as an environment "
        "variable or in a YAML file; the command line wins over the environment, and that over the file.",
    )
    parser.add_argument("model_positional", nargs="?", metavar="MODEL", help="the same as --model")
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    given = dict(vars(arguments))
    positional = given.pop("model_positional", None)
    if positional is not None and given.setdefault("model", positional) != positional:
        raise OptionError(f"two models are given, {positional} and --model {given['model']}; give one")
    values = resolve_options(given)
    logging.basicConfig(level=values["log_level"].upper(), format="%(levelname)s %(name)s: %(message)s")

    from ...model.weights.resolve import resolve_model

    files = resolve_model(values["model"], needs_weights=values["load_format"] != "dummy")
    config = server_config(values, model_path=str(files.path), model_name=files.name)
    listener = _listen(config.host, config.port)

    from ..engine.process import EngineProcess

    # The engine's imports and the loading of weights run while this process imports its own libraries.
    process = EngineProcess(config.engine, config.log_level)
    try:
        from ..serve import serve

        return serve(config, files, process, listener)
    finally:
        process.socket.close()
        process.stop(0.0)  # a drained one has gone already


def _listen(host: str, port: int) -> socket.socket:
    """Bind before anything is loaded: a port in use should not cost a start-up to find out."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        raise OptionError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --host or --port"
        ) from None
    listener.set_inheritable(False)
    return listener
