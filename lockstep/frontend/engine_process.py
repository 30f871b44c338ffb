"""The engine's process: `python -m lockstep.frontend.engine_process FD DEATH_FD STACK_FD`. It ends when its parent does.

What it is comes as the first message over FD; what became of it goes back there: `Ready`, or why there is none.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import traceback
from importlib import import_module
from pathlib import Path

import msgspec
import zmq

from lockstep.cluster.contract import EngineClient
from lockstep.cluster.health import EngineHealth
from lockstep.cluster.local import LocalClient
from lockstep.config.defaults import default_backend
from lockstep.executor.contract import ExecutorError
from lockstep.frontend import engine_wire as wire
from lockstep.frontend.engine_server import EngineServer, bind
from lockstep.observability import logging
from lockstep.utils import procs
from lockstep.utils.collection import rare_collections
from lockstep.utils.frames import Channel


class Ready(msgspec.Struct, tag="ready", array_like=True):
    """The engine serves its endpoint."""


class Failed(msgspec.Struct, tag="failed", array_like=True):
    """The engine never ran, or can run no more, and the process ends. user: what the user set is wrong. again: another may do better."""

    message: str
    user: bool
    log_tail: list[str]
    again: bool = False


class Alive(msgspec.Struct, tag="alive", array_like=True):
    """It serves; said every `PULSE_S` seconds. below: (pid, birth) of the processes below it. worked: it has brought tokens.

    paused, sleep_level: as operators want it; said at once when that changes.
    """

    below: list[tuple[int, int]]
    worked: bool
    paused: bool = False
    sleep_level: int = 0


decode_word = msgspec.msgpack.Decoder(Ready | Failed | Alive).decode
decode_launch = msgspec.msgpack.Decoder(wire.Launch).decode


def main() -> None:
    connection, death_fd = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    channel: Channel[wire.Launch] = Channel(connection, decode_launch)
    launch = _launch(channel)
    procs.die_with_parent(launch.parent_pid, death_fd, follow_thread=launch.follow_thread)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=int(sys.argv[3]), all_threads=True)
    sys.path[:] = launch.sys_path
    logging.configure(launch.config.runtime.log_level)
    client: EngineClient | None = None
    code, again = 0, False
    try:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        server_socket = bind(context, launch.endpoint)  # API processes may knock from now on
        module, _, name = launch.client.partition(":")
        client = getattr(import_module(module), name)(launch.config, launch.spec, Path(launch.folder), replaced=launch.restarts > 0)
        assert client is not None
        stand_still(client, launch)
        again = replaceable(client)
        server = EngineServer(
            *(client, server_socket, launch.secret),
            on_beat=lambda health: channel.send(wire.encode(_alive(health))),
            restarts=launch.restarts,
            replaced=again,
        )
        channel.send(wire.encode(Ready()))
        channel.drain()
        with rare_collections():
            server.run()
    except ConnectionError:
        code = 3  # the parent is gone
    except Exception as e:
        code = 1
        with contextlib.suppress(ConnectionError):
            channel.send(wire.encode(_failed(e, again)))
            channel.drain()
    if client is not None:
        client.shutdown()
    with contextlib.suppress(NameError):
        server_socket.close()
        context.term()  # what is still to be said is said, for a moment
    sys.stderr.flush()
    os._exit(code)


def _launch(channel: Channel[wire.Launch]) -> wire.Launch:
    """What is to be run. Ends this process where its starter has ended first: there is nothing to do, and nobody to tell."""
    try:
        while True:
            channel.wait(None)
            if found := channel.receive():
                return found[0]
    except ConnectionError:
        os._exit(1)


def _alive(health: EngineHealth) -> Alive:
    below = [(pid, procs.birth(pid)) for pid in health.pids() if pid != health.pid]
    worked = any(one.stats is not None and one.stats.generated_tokens for one in health.replicas)
    return Alive(below, worked, health.paused, health.sleep_level)


def stand_still(client: EngineClient, launch: wire.Launch) -> None:
    """Have the engine paused or asleep before it serves, if the one before it was."""
    if launch.sleep_level:
        client.sleep(launch.sleep_level)
    elif launch.paused:
        client.pause()


def replaceable(client: EngineClient) -> bool:
    """Whether another engine's process may do better when this engine fails. A router has given up its replicas by then; but a
    single engine on Ray has lost a rank, and Ray may place another. Ranks that others started do not come again.
    """
    parallel = client.config.parallel
    return isinstance(client, LocalClient) and default_backend(parallel) == "ray"


def _failed(error: Exception, again: bool) -> Failed:
    if isinstance(error, ExecutorError):
        user = error.error_type in ("ConfigError", "WeightError")
        return Failed(str(error), user, error.log_tail, again and not user)
    if isinstance(error, ValueError):
        return Failed(str(error), True, [])
    return Failed(f"{type(error).__name__}: {error}", False, traceback.format_exc().splitlines())


if __name__ == "__main__":
    main()
