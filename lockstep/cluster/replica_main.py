"""A replica's process: one engine, driven by orders from the router. `python -m lockstep.cluster.replica_main FD DEATH_FD STACK_FD`.

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
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from lockstep.cluster import wire
from lockstep.cluster.heart import Heart
from lockstep.cluster.incident import facts
from lockstep.config.tree import EngineConfig
from lockstep.engine.core import EngineCore
from lockstep.engine.errors import RequestError
from lockstep.executor.contract import Executor, ExecutorError
from lockstep.executor.factory import make_executor
from lockstep.observability import logging
from lockstep.observability.flight_recorder import FlightRecorder
from lockstep.protocol import EngineOutput
from lockstep.utils import procs
from lockstep.utils.collection import rare_collections
from lockstep.utils.frames import Channel

LOST_ROUTER = 3  # exit code: the router is gone, or cannot be reached
LOOK_S = 0.25  # so often, with nothing to do, whether every rank lives
REPORT_S = 0.02  # at most so often the router is told what this replica carries

# What the router may call: name -> how it is done.
CALLS: dict[str, Callable[..., Any]] = {
    "collective_rpc": lambda core, *args: core.executor.collective_rpc(*args),
    "ranks": lambda core: core.executor.memory(),
    "stats": lambda core: core.stats(),
    "start_profile": lambda core: core.executor.start_timelines(),
    "stop_profile": lambda core: core.executor.take_timelines(),
    "pause": lambda core: core.pause(),
    "resume": lambda core: core.resume(),
    "sleep": lambda core, level: core.sleep(level),
    "wake_up": lambda core: core.wake_up(),
    "reset_prefix_cache": lambda core: core.reset_prefix_cache(),
}


class Ended(Exception):
    """The router said stop."""


class Replica:
    """One engine and its channel to the router."""

    def __init__(self, core: EngineCore, channel: Channel[wire.Order], keeper: Channel[wire.Order] | None = None) -> None:
        """keeper: who started this process, where that is not the router."""
        self.core, self.channel, self._keeper = core, channel, keeper
        self._worked = False
        self.ticket = 0
        self._reported_s = 0.0
        self._speaking = threading.Lock()  # the main thread and the heart's

    def run(self, orders: Sequence[wire.Order] = ()) -> None:
        """Until told to stop (Ended), the router is gone (ConnectionError), or the engine fails (ExecutorError)."""
        for order in orders:
            self._take(order)
        while True:
            busy = self.core.has_unfinished()
            if self.channel.wait(0.0 if busy else LOOK_S):
                for order in self.channel.receive():
                    self._take(order)
            if not busy:
                self.core.check_health()  # a rank that dies while there is nothing to do is told at once
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
        self.say(wire.News(outputs, load, self.ticket))
        if not self._worked and any(output.new_token_ids for output in outputs):
            self._worked = True
            if self._keeper is not None:
                with contextlib.suppress(ConnectionError):  # when it is gone, so are we, soon
                    self._keeper.send(wire.encode(wire.Worked()))

    def say(self, reply: wire.Reply) -> None:
        """Tell the router. From any thread. Raises ConnectionError when it is gone."""
        with self._speaking:
            self.channel.send(wire.encode(reply))
            self.channel.drain()

    def give_up(self, error: Exception) -> NoReturn:
        """Say why, and end this process. From any thread: the others may be stuck."""
        with contextlib.suppress(ConnectionError):
            self.say(_failed(error, self.core))
        sys.stderr.flush()
        os._exit(1)

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
            self.say(self._call(order))
        else:
            raise Ended

    def _call(self, order: wire.Call) -> wire.Answer | wire.Refused:
        try:
            value = CALLS[order.method](self.core, *order.args)
            return wire.Answer(order.id, msgspec.Raw(wire.encode(value)))
        except Exception as e:
            if self.core.failure is not None:
                raise self.core.failure from None
            self.core.executor.check_health()  # a dead rank is a failure of the engine, not of the call
            return wire.Refused(order.id, str(e) if isinstance(e, ExecutorError) else f"{type(e).__name__}: {e}")


def main() -> None:
    connection, death_fd = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    channel: Channel[wire.Order] = Channel(connection, wire.decode_order)
    launch, orders = _launch(channel)
    procs.die_with_parent(launch.parent_pid, death_fd, follow_thread=launch.follow_thread)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the router's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=int(sys.argv[3]), all_threads=True)
    sys.path[:] = launch.sys_path
    logging.configure(launch.config.runtime.log_level)
    keeper = None
    if launch.router_fd is not None:
        keeper, channel = channel, Channel(socket.socket(fileno=launch.router_fd), wire.decode_order)
    core: EngineCore | None = None
    executor: Executor | None = None
    replica: Replica | None = None
    try:
        executor = make_executor(launch.config, launch.spec, Path(launch.folder), again=launch.again)
        core = EngineCore(launch.config, launch.spec, executor, just_in_time=True)
        core.flight.who = f"replica {launch.config.parallel.data_parallel_rank or 0}"
        core.flight.listen()
        core.flight.event("ready")
        replica = Replica(core, channel, keeper)
        executor.say_again()
        replica.say(wire.Ready(core.config, core.memory))
        Heart(core, replica.say, replica.give_up).start()
        with rare_collections():
            replica.run(orders)
    except Ended:
        code = 0
    except ConnectionError:
        code = LOST_ROUTER
    except Exception as e:
        code = 1
        if executor is not None:
            executor.give_up(e)  # first: who hears of the failure below may end this process at once
        failed = _failed(e, core, launch.config)
        with contextlib.suppress(ConnectionError):
            if replica is not None:
                replica.say(failed)  # the heart may be speaking
            else:
                channel.send(wire.encode(failed))
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


def _failed(error: Exception, core: EngineCore | None, config: EngineConfig | None = None) -> wire.Failed:
    """Last words. What led there is written down, but for what the user can set right."""
    told = isinstance(error, ExecutorError)
    if isinstance(error, ExecutorError):
        why = error
    else:
        trace = traceback.format_exc().splitlines()
        why = ExecutorError(str(error), kind="raised", error_type=type(error).__name__, log_tail=trace)
    if core is not None:
        config = core.config
    incident = ""
    if config is not None and (told or core is not None):
        flight = core.flight if core is not None else FlightRecorder(f"replica {config.parallel.data_parallel_rank or 0}")
        about = {"culprit": "rank", "culprit_replica": config.parallel.data_parallel_rank or 0, **facts(why)}
        incident = flight.dump(config.runtime.incident_dir, about)
    message = f"{why}\nThe whole story: {incident}" if incident else str(why)
    return wire.Failed(message, why.rank, why.phase, why.exitcode, why.kind, why.error_type, why.log_tail, why.ranks, incident)


if __name__ == "__main__":
    main()
