"""An API process: `python -m lockstep.server.processes_child FD DEATH_FD LISTENER_FD STACK_FD PARENT_PID`.

It ends when its parent does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

from lockstep.executor.contract import ExecutorError
from lockstep.frontend.async_engine import AsyncEngine
from lockstep.frontend.engine_process import Failed, Ready
from lockstep.frontend.tokenizer import load_tokenizer
from lockstep.observability import logging
from lockstep.server.launch_serving import Steps, run_serving
from lockstep.server.processes import ApiLaunch, EngineLost, Order, Tidings, Turning, connect_limit_s, decode_order, encode
from lockstep.server.state import ServerState
from lockstep.utils import procs
from lockstep.utils.frames import Channel


def main() -> None:
    fd, death_fd, listener_fd, stack_fd, parent_pid = map(int, sys.argv[1:6])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until it serves: there is nothing to drain
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    procs.die_with_parent(parent_pid, death_fd, follow_thread=False)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=stack_fd, all_threads=True)
    channel: Channel[Order] = Channel(socket.socket(fileno=fd), decode_order)
    code = 1
    try:
        code = _serve(_launch(channel), channel, socket.socket(fileno=listener_fd))
    except ConnectionError:
        code = 3  # the parent is gone
    except Exception as e:
        with contextlib.suppress(ConnectionError):
            channel.send(encode(_failed(e)))
            channel.drain()
    sys.stderr.flush()
    os._exit(code)


def _serve(launch: ApiLaunch, channel: Channel[Order], listener: socket.socket) -> int:
    sys.path[:] = launch.sys_path
    logging.configure(launch.config.runtime.log_level)
    engine = AsyncEngine(
        launch.endpoint, launch.secret, launch.spec, Path(launch.folder), load_tokenizer(Path(launch.words)), index=launch.index
    )
    state = ServerState(launch.options, engine, launch.names)

    def failure() -> Exception | None:
        words = channel.receive() if channel.wait(0.0) else []
        for word in words:
            if isinstance(word, Tidings):
                engine.lost_why, state.beside = word.engine_why, word.missing
        return next((ExecutorError(word.message) for word in words if isinstance(word, EngineLost)), None)

    steps = Steps(before=lambda: channel.send(encode(Ready())), turned=lambda: channel.send(encode(Turning())))
    return run_serving(state, failure, listener, steps, connect_limit_s(launch.config))


def _launch(channel: Channel[Order]) -> ApiLaunch:
    while True:
        channel.wait(None)
        if found := channel.receive():
            assert isinstance(found[0], ApiLaunch)
            return found[0]


def _failed(error: Exception) -> Failed:
    user = isinstance(error, ValueError)
    return Failed(str(error), user, [] if user or isinstance(error, ExecutorError) else traceback.format_exc().splitlines())


if __name__ == "__main__":
    main()
