"""The `octavo` command."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from importlib.metadata import version

from ..model.spec import ModelError
from .options import OptionError, add_arguments, resolve_options, server_config


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status (2: a mistake in the settings, 1: it could not serve)."""
    arguments = _parser().parse_args(argv)
    try:
        return _serve(arguments)
    except OptionError as error:
        return _fail(str(error), 2)
    except ModelError as error:
        return _fail(str(error), 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="octavo", description="A small, readable, honest inference server for language models."
    )
    parser.add_argument("--version", action="version", version=f"octavo {version('octavo')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a model over the OpenAI-compatible API",
        description="Serve a model over the OpenAI-compatible API. Every setting can also be given as an environment "
        "variable or in a YAML file; the command line wins over the environment, and that over the file.",
    )
    serve.add_argument("model_positional", nargs="?", metavar="MODEL", help="the same as --model")
    add_arguments(serve)
    return parser


def _serve(arguments: argparse.Namespace) -> int:
    given = vars(arguments)
    positional = given.pop("model_positional", None)
    if positional is not None:
        given.setdefault("model", positional)
    values = resolve_options(given)
    logging.basicConfig(level=values["log_level"].upper(), format="%(levelname)s %(name)s: %(message)s")

    from ..model.weights.resolve import resolve_model

    files = resolve_model(values["model"])
    config = server_config(values, model_path=str(files.path), model_name=files.name)
    listener = _listen(config.host, config.port)

    from .engine.process import EngineProcess

    # The engine's imports and the loading of weights run while this process imports its own libraries.
    process = EngineProcess(config.engine, config.log_level)
    try:
        from .serve import serve

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


def _fail(message: str, status: int) -> int:
    print(f"octavo: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
