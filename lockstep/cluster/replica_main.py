"""A replica's process: one engine, driven by orders from the router. `python -m lockstep.cluster.replica_main FD DEATH_FD`.

Orders are taken between steps. What a step brought is sent at once. When the engine fails, the process says why and ends:
the router starts a new one, and no half-broken engine is ever asked again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lockstep.cluster import wire
from lockstep.engine.core import EngineCore
from lockstep.engine.errors import RequestError
from lockstep.executor.contract import ExecutorError
from lockstep.executor.factory import make_executor
from lockstep.observability import logging
from lockstep.protocol import EngineOutput
from lockstep.utils import procs
from lockstep.utils.frames import Channel

LOST_ROUTER = 3  # exit code: the router is gone, or cannot be reached
REPORT_S = 0.02  # at most so often the router is told what this replica carries,
LIVE_S = 0.5  # and so often, idle or not, how it does

# What the router may call: name -> how it is done.
CALLS: dict[str, Callable[..., Any]] = {
    "collective_rpc": lambda core, *args: core.executor.collective_rpc(*args),
    "ranks": lambda core: core.executor.memory(),
    "stats": lambda core: core.stats(),
    "start_profile": lambda core: core.executor.start_timelines(),
    "stop_profile": lambda core: core.executor.take_timelines(),
}


class Ended(Exception):
    """The router said stop."""


class Replica:
    """One engine and its channel to the router."""

    def __init__(self, core: EngineCore, channel: Channel[wire.Order]) -> None:
        self.core, self.channel = core, channel
        self.ticket = 0
        self._reported_s = self._live_s = 0.0

    def run(self, orders: Sequence[wire.Order] = ()) -> None:
        """Until told to stop (Ended), the router is gone (ConnectionError), or the engine fails (ExecutorError)."""
        for order in orders:
            self._take(order)
        while True:
            busy = self.core.has_unfinished()
            if self.channel.wait(0.0 if busy else LIVE_S):
                for order in self.channel.receive():
                    self._take(order)
            elif not busy:
                self._send([], report=False)
            if self.core.has_unfinished():
                self._step()

    def _step(self) -> None:
        outputs = self.core.step()
        if self.core.failure is not None:  # the router replays what is unfinished: nobody hears of these ends
            self._send([o for o in outputs if o.finish_reason != "error"], report=False)
            raise self.core.failure
        now_s = time.monotonic()
        report = now_s - self._reported_s >= REPORT_S or not self.core.has_unfinished()
        if outputs or report:
            self._reported_s = now_s if report else self._reported_s
            self._send(outputs, report)

    def _send(self, outputs: list[EngineOutput], report: bool) -> None:
        load = self.core.scheduler.load() if report else None
        live, now_s = None, time.monotonic()
        if now_s - self._live_s >= LIVE_S:
            live, self._live_s = self.core.report(), now_s
        self.channel.send(wire.encode(wire.News(outputs, load, self.ticket, live)))
        self.channel.drain()

    def _take(self, order: wire.Order) -> None:
        if isinstance(order, wire.Add):
            self.ticket = order.ticket
            try:
                self.core.add_request(order.request)
            except RequestError as e:  # the router checks too: a request that only this replica refuses still ends once
                self._send(
                    [EngineOutput(request_id=order.request.request_id, new_token_ids=[], finish_reason="error", error=str(e))], False
                )
        elif isinstance(order, wire.Abort):
            self.core.abort(order.request_ids)
        elif isinstance(order, wire.Call):
            self.channel.send(wire.encode(self._call(order)))
            self.channel.drain()
        else:
            raise Ended

    def _call(self, order: wire.Call) -> wire.Answer | wire.Refused:
        try:
            value = CALLS[order.method](self.core, *order.args)
            return wire.Answer(order.id, msgspec.Raw(wire.encode(value)))
        except Exception as e:
            self.core.executor.check_health()  # a dead rank is a failure of the engine, not of the call
            return wire.Refused(order.id, str(e) if isinstance(e, ExecutorError) else f"{type(e).__name__}: {e}")


def main() -> None:
    connection, death_fd = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    channel: Channel[wire.Order] = Channel(connection, wire.decode_order)
    launch, orders = _launch(channel)
    procs.die_with_parent(launch.parent_pid, death_fd, follow_thread=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the router's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.enable()
    sys.path[:] = launch.sys_path
    logging.configure(launch.config.runtime.log_level)
    if launch.router_fd is not None:
        channel = Channel(socket.socket(fileno=launch.router_fd), wire.decode_order)
    core = None
    try:
        executor = make_executor(launch.config, launch.spec, Path(launch.folder))
        core = EngineCore(launch.config, launch.spec, executor)
        channel.send(wire.encode(wire.Ready(core.config, core.memory)))
        channel.drain()
        Replica(core, channel).run(orders)
    except Ended:
        code = 0
    except ConnectionError:
        code = LOST_ROUTER
    except Exception as e:
        code = 1
        with contextlib.suppress(ConnectionError):
            channel.send(wire.encode(_failed(e)))
            channel.drain()
    if core is not None:
        core.shutdown()
    sys.stderr.flush()
    os._exit(code)  # tear-down of a loaded maths library can hang


def _launch(channel: Channel[wire.Order]) -> tuple[wire.Launch, list[wire.Order]]:
    """The first message, and orders that came with it."""
    while True:
        channel.wait(None)
        if found := channel.receive():
            launch, *orders = found
            assert isinstance(launch, wire.Launch)
            return launch, orders


def _failed(error: Exception) -> wire.Failed:
    if isinstance(error, ExecutorError):
        return wire.Failed(str(error), error.rank, error.phase, error.exitcode, error.kind, error.error_type, error.log_tail)
    trace = traceback.format_exc().splitlines()
    return wire.Failed(str(error), None, "", None, "raised", type(error).__name__, trace)


if __name__ == "__main__":
    main()
