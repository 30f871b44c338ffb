"""`lockstep serve` from its settings to its end: the port first, then the engine's process, then HTTP.

    this process: HTTP  --ZeroMQ-->  the engine's process: router  -->  replica processes  -->  their ranks

The port is bound before anything is loaded, and held: a port that is taken is told at once. While the engine loads, the
tokenizer does too, here.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from lockstep.config.errors import ConfigError
from lockstep.config.serve import ServeOptions
from lockstep.config.source import DEMO_NAME
from lockstep.config.tree import EngineConfig
from lockstep.config.validate import resolve
from lockstep.executor.contract import ExecutorError
from lockstep.frontend.async_engine import AsyncEngine
from lockstep.frontend.engine_handle import CLIENT, EngineHandle
from lockstep.frontend.tokenizer import load_in_background, load_tokenizer, tokenizer_folder
from lockstep.observability import logging
from lockstep.observability.otel import check_endpoint
from lockstep.server.app import create_app
from lockstep.server.state import ServerState

POLL_S = 0.2


def serve(config: EngineConfig, options: ServeOptions, *, client: str = CLIENT) -> int:
    """Serve until told to stop; the exit code. Raises ConfigError or ExecutorError when it cannot start, or cannot go on."""
    logging.configure(config.runtime.log_level)
    config, spec, folder = resolve(config)
    check_endpoint(options.otlp_traces_endpoint)
    listener = listen(options)
    words = tokenizer_folder(config.model, folder)
    with contextlib.closing(listener):
        handle = EngineHandle(config, spec, folder, client=client)
        try:
            tokenizer = load_in_background(lambda: load_tokenizer(words))
            handle.wait()
            engine = AsyncEngine(handle.endpoint, handle.secret, spec, folder, tokenizer.result())
            names = options.served_model_name or [config.model.model or DEMO_NAME]
            return asyncio.run(_serve(ServerState(options, engine, names), handle, listener))
        finally:
            handle.close()


def listen(options: ServeOptions) -> socket.socket:
    """The bound socket. Raises ConfigError when it cannot be had."""
    if options.uds:
        path = Path(options.uds)
        found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            found.bind(str(path))
        except OSError as e:
            raise ConfigError(
                f"uds={options.uds!r} cannot be listened at: {e.strerror}: give another path, or remove what is there."
            ) from None
        return found
    try:
        family, kind, proto, _, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, proto)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(1024)
    except OSError as e:
        raise ConfigError(f"host={options.host} port={options.port} cannot be listened at: {e.strerror}: give another --port.") from None
    return found


async def _serve(state: ServerState, handle: EngineHandle, listener: socket.socket) -> int:
    """Run HTTP until a signal comes or the engine is gone."""
    await state.engine.connect()
    server = uvicorn.Server(uvicorn.Config(create_app(state), log_level="warning", lifespan="off", access_log=False))
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, setattr, server, "should_exit", True)
    watch = asyncio.create_task(_watch(state, handle, server))
    where = state.options.uds or "http://{}:{}".format(*listener.getsockname()[:2])
    print(f"lockstep serves {state.model} at {where}", file=sys.stderr, flush=True)
    await server.serve(sockets=[listener])
    watch.cancel()
    failure = state.engine.failure
    await state.engine.close()
    if failure is not None:
        raise ExecutorError(str(failure))
    return 0


async def _watch(state: ServerState, handle: EngineHandle, server: uvicorn.Server) -> None:
    """The engine's end is the server's, once every request has been answered."""
    while state.engine.failure is None:
        await asyncio.sleep(POLL_S)
        failure = handle.failure()
        if failure is not None:
            state.engine.fail(str(failure))
    server.should_exit = True
