"""Several processes that speak HTTP, on one listening socket, before one engine: started, watched, restarted, ended.

    this process:   the socket (bound once, handed down), the engine's process, this loop
    API process i:  HTTP, tokenizing, an AsyncEngine of its own that is number i to the engine

The system hands each new connection to whichever of them is free first. When one dies, its connections are lost and nobody
else's; the engine aborts what it ran once its successor says Hello under the same number. When this process dies, so do all.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import msgspec

from lockstep.cluster.supervisor import RestartPolicy, State, Supervisor
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.config.serve import ServeOptions
from lockstep.config.tree import EngineConfig
from lockstep.executor.contract import ExecutorError
from lockstep.frontend.async_engine import RESTART_GRACE_S
from lockstep.frontend.engine_keeper import EngineKeeper
from lockstep.frontend.engine_process import Failed, Ready
from lockstep.observability.logging import get_logger
from lockstep.protocol.health import QUIET_S
from lockstep.server.missing import Missing
from lockstep.server.starting import Porch
from lockstep.server.watchdog import HUNG_S
from lockstep.utils import env, procs, stacks
from lockstep.utils.frames import Channel, send_one
from lockstep.utils.interrupt import heard

POLL_S = 0.05
START_S = 120.0  # beyond the engine's: one that is started again may find that the engine is, too
LAUNCH_S = 30.0
LATE_S = 5.0  # without a turn of its event loop: told to others
LAST_WORDS_S = 20.0  # beyond shutdown_timeout: for what is left to end, and to be said
POLICY = RestartPolicy(first_s=0.1, most_failures=6)
_log = get_logger(__name__)


class ApiLaunch(msgspec.Struct, tag="launch", array_like=True, kw_only=True):
    """All that an API process is told. words: folder of the tokenizer. names: of the model. The last four are filled in for each."""

    options: ServeOptions
    config: EngineConfig
    spec: ModelSpec
    folder: str
    words: str
    names: list[str]
    sys_path: list[str] = []
    endpoint: str = ""
    secret: str = ""
    index: int = 0


class EngineLost(msgspec.Struct, tag="lost", array_like=True):
    """The engine's process is gone: answer every request with this, then end."""

    message: str


class Tidings(msgspec.Struct, tag="tidings", array_like=True, frozen=True):
    """What an API process cannot know by itself. engine_why: why there is no engine just now. missing: of the others."""

    engine_why: str
    missing: list[Missing]


class Turning(msgspec.Struct, tag="turning", array_like=True):
    """The API process's event loop turns; said every `PULSE_S` seconds."""


Order = ApiLaunch | EngineLost | Tidings
encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_word = msgspec.msgpack.Decoder(Ready | Failed | Turning).decode


class ApiProcess:
    """One start of one API process."""

    def __init__(self, launch: ApiLaunch, listener: socket.socket, death_fd: int) -> None:
        ours, theirs = socket.socketpair()
        self._stack_file = tempfile.TemporaryFile("w+b", buffering=0)  # noqa: SIM115 - closed by `end`
        fds = [theirs.fileno(), death_fd, listener.fileno(), self._stack_file.fileno()]
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lockstep.server.processes_child", *map(str, fds), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=fds,
                start_new_session=True,
                env=env.child_environment(PYTHONUNBUFFERED="1"),
            )
        except BaseException:
            ours.close()
            self._stack_file.close()
            raise
        finally:
            theirs.close()
        self.index = launch.index
        self.looked_s = 0.0
        self.stopped_s: float | None = None  # since when
        self.heard_s = time.monotonic()  # it said something
        self.told = Tidings("", [])
        self.why = ""  # it is ended
        with contextlib.suppress(OSError):  # dead already: its end says so
            send_one(ours, encode(launch), time.monotonic() + LAUNCH_S)
        self.channel: Channel[Ready | Failed | Turning] = Channel(ours, decode_word)

    def heard(self) -> list[Any]:
        """What it has said since."""
        with contextlib.suppress(ConnectionError, msgspec.DecodeError):
            if found := self.channel.receive():
                self.heard_s = time.monotonic()
            return found
        return []

    def tell(self, order: EngineLost | Tidings) -> None:
        with contextlib.suppress(OSError):
            self.channel.send(encode(order))

    def stack(self) -> list[str]:
        """Its Python stack, as lines."""
        return stacks.written(self.process.pid, self._stack_file)

    def signal(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def end(self) -> None:
        """Be done with it. May be called twice."""
        procs.kill_group(self.process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2.0)
        self.channel.close()
        self._stack_file.close()


class Processes:
    """All API processes of one server. One thread."""

    def __init__(self, launch: ApiLaunch, handle: EngineKeeper, listener: socket.socket, porch: Porch) -> None:
        self._launch, self._handle, self._listener, self._porch = launch, handle, listener, porch
        self._death_pipe = os.pipe()
        self._signals: list[int] = []
        self._forwarded = 0
        self._kill_s: float | None = None  # when patience with a drain ends
        count = launch.options.api_server_count
        self.supervisor = Supervisor(count, POLICY, time.monotonic())
        self.running: dict[int, ApiProcess] = {}
        self._codes: list[int] = []  # of those that ended in a drain
        self._lost_s: dict[int, float] = {}  # when each of those died that are not back
        self._why: dict[int, str] = {}  # how each of them did
        self._turned_s = time.monotonic()  # this process did its last turn

    def run(self, ready: Callable[[], None]) -> int:
        """Until a signal has drained them all, or the engine is gone; the exit code. Raises ConfigError or ExecutorError."""
        before = {number: signal.signal(number, lambda n, _: self._signals.append(n)) for number in heard()}
        try:
            for index in range(len(self.supervisor.lives)):
                self._start(index)
            announced = False
            while True:
                if not announced and all(life.state is State.READY for life in self.supervisor.lives):
                    announced = True
                    ready()
                self._turn()
                if self._signals and not self.running:
                    return max(self._codes, default=0)
        finally:
            self.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def close(self) -> None:
        """End them all. May be called twice."""
        for api in self.running.values():
            api.end()
        self.running.clear()
        for fd in self._death_pipe if self._death_pipe[0] >= 0 else ():
            os.close(fd)
        self._death_pipe = (-1, -1)

    def _start(self, index: int) -> None:
        sys_path = [path or os.getcwd() for path in sys.path]
        launch = msgspec.structs.replace(
            self._launch, endpoint=self._handle.endpoint, secret=self._handle.secret, index=index, sys_path=sys_path
        )
        self.running[index] = ApiProcess(launch, self._listener, self._death_pipe[0])

    def _turn(self) -> None:
        """Wait a moment, then see to everything that has happened."""
        poll = select.poll()
        for api in self.running.values():
            poll.register(api.channel, select.POLLIN)
        poll.poll(POLL_S * 1000)
        self._note_turn()
        self._pass_on_signals()
        failure = self._handle.failure()
        if failure is not None:
            self._lose_engine(failure)
        for api in list(self.running.values()):
            self._hear(api)
        if not self._signals:
            for index in self.supervisor.due(time.monotonic()):
                self._start(index)
            self._tell_all()

    def _note_turn(self) -> None:
        """Where this process was held up itself, so may the others have been: they get their time anew."""
        now_s = time.monotonic()
        if now_s - self._turned_s > LATE_S / 2:
            for api in self.running.values():
                api.heard_s = now_s
        self._turned_s = now_s

    def _tell_all(self) -> None:
        """What has changed since they were told."""
        tidings = Tidings(self._handle.lost_why, self._missing(time.monotonic()))
        for api in self.running.values():
            if api.told != tidings and self.supervisor.lives[api.index].state is State.READY:
                api.told = tidings
                api.tell(tidings)

    def _missing(self, now_s: float) -> list[Missing]:
        """Those that served and do not now."""
        found = []
        for index, life in enumerate(self.supervisor.lives):
            api = self.running.get(index)
            if index in self._lost_s:
                why = f"it {self._why[index]}: another one starts"
                found.append(Missing(index, 0 if api is None else api.process.pid, "starting", self._lost_s[index], why))
            elif api is not None and api.stopped_s is not None:
                found.append(Missing(index, api.process.pid, "stopped", api.stopped_s, "it was stopped (SIGSTOP, or a debugger)"))
            elif api is not None and life.state is State.READY and now_s - api.heard_s > LATE_S:
                found.append(Missing(index, api.process.pid, "silent", api.heard_s, "its event loop does not turn"))
        return found

    def _pass_on_signals(self) -> None:
        for number in self._signals[self._forwarded :]:
            for api in self.running.values():
                api.signal(number)
            self._forwarded += 1
            self._kill_s = time.monotonic() + (self._launch.options.shutdown_timeout + LAST_WORDS_S if self._forwarded == 1 else 2.0)
        if self._kill_s is not None and time.monotonic() > self._kill_s:
            for api in self.running.values():
                api.signal(signal.SIGKILL)

    def _hear(self, api: ApiProcess) -> None:
        now_s, life = time.monotonic(), self.supervisor.lives[api.index]
        ended = api.process.poll() is not None  # looked at first: what it said before it ended is there to be read
        for word in api.heard():
            if isinstance(word, Failed) and life.starts == 1 and life.state is State.STARTING:
                raise ConfigError(word.message) if word.user else ExecutorError(word.message, log_tail=word.log_tail)
            if isinstance(word, Ready) and life.state is State.STARTING:
                self._porch.let_go()
                self.supervisor.ready(api.index, now_s)
                self.supervisor.worked(api.index) if life.starts == 1 else None
                lost_s = self._lost_s.pop(api.index, None)
                if lost_s is not None:
                    _log.warning("API process %d is back, %.1f s after it was lost", api.index, now_s - lost_s)
        if not ended:
            limit_s = START_S + connect_limit_s(self._launch.config)
            if life.state is State.STARTING and now_s - life.since_s > limit_s:
                raise ExecutorError(f"API process {api.index} was not ready after {limit_s:g} s.", phase="start", kind="hung")
            self._end_if_stopped(api, now_s)
            self._end_if_hung(api, now_s)
            return
        code = api.process.returncode
        del self.running[api.index]
        api.end()
        if self._signals:
            told = life.state is State.STARTING and code == -signal.SIGTERM  # it had nothing to drain yet
            self._codes.append(0 if told else code if code >= 0 else 128 - code)
            return
        state = self.supervisor.failed(api.index, now_s)
        self._lost_s.setdefault(api.index, now_s)
        self._why[api.index] = api.why or f"died: {procs.exit_cause(code)}"
        _log.error("API process %d (pid %d) %s; its connections are lost", api.index, api.process.pid, self._why[api.index])
        if state is State.GIVEN_UP:
            raise ExecutorError(f"API process {api.index} died {life.failures} times in a row, the last time it {self._why[api.index]}.")

    def _end_if_stopped(self, api: ApiProcess, now_s: float) -> None:
        """One that was stopped (SIGSTOP, or a debugger) keeps its connections waiting: another one takes its place."""
        if now_s - api.looked_s < QUIET_S / 2:
            return
        api.looked_s = now_s
        if procs.state(api.process.pid) != "T":
            api.stopped_s = None
            return
        api.stopped_s = api.stopped_s or now_s
        if now_s - api.stopped_s >= QUIET_S:
            _log.error("API process %d (pid %d) was stopped (SIGSTOP, or a debugger): it is ended", api.index, api.process.pid)
            api.why = "was stopped (SIGSTOP, or a debugger)"
            api.signal(signal.SIGKILL)

    def _end_if_hung(self, api: ApiProcess, now_s: float) -> None:
        """One whose event loop does not turn keeps its connections waiting, too."""
        hung_s = now_s - api.heard_s
        if self._signals or hung_s <= HUNG_S or api.why or self.supervisor.lives[api.index].state is not State.READY:
            return
        api.why = f"hung: its event loop did not turn for {hung_s:.0f} s"
        stack = "\n".join(api.stack()) or "(it cannot be read)"
        _log.error("API process %d (pid %d) %s, and is ended; its stack:\n%s", api.index, api.process.pid, api.why, stack)
        api.signal(signal.SIGKILL)

    def _lose_engine(self, failure: Exception) -> None:
        """Every request is answered with the reason, then all is over. Raises it."""
        for api in self.running.values():
            api.tell(EngineLost(str(failure)))
        deadline = time.monotonic() + LAST_WORDS_S
        for api in self.running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                api.process.wait(max(0.0, deadline - time.monotonic()))
        raise failure


def connect_limit_s(config: EngineConfig) -> float:
    """How long an API process may wait for the engine, in seconds: it may just be starting anew."""
    return config.runtime.startup_timeout_seconds + RESTART_GRACE_S


def serve_by_processes(launch: ApiLaunch, handle: EngineKeeper, listener: socket.socket, porch: Porch, ready: Callable[[], None]) -> int:
    """Run `launch.options.api_server_count` API processes until the end; the exit code. Raises ConfigError or ExecutorError."""
    porch.app.at = "the processes that speak HTTP start"
    return Processes(launch, handle, listener, porch).run(ready)
