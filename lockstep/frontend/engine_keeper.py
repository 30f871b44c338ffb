"""The engine's process, kept running: when it dies or is stuck, another one takes its place at the same endpoint.

API processes see the death by themselves, and give the new engine what is unfinished (`AsyncEngine`). It is not started before
every process of the former one is gone: memory and cores are free again.

    the process died by a signal, or was stopped, or hangs   it is replaced, after a pause
    it said why it cannot go on                              that is the end: its replicas were given up. But where the engine
                                                             had none (a single one on Ray) it is replaced, ranks and all
    it died so many times in a row (see RestartPolicy)       that is the end
"""

from __future__ import annotations

import os
import secrets
import time
import weakref
from pathlib import Path

from lockstep.cluster.incident import facts
from lockstep.cluster.operate import Mode
from lockstep.cluster.supervisor import RestartPolicy, State, Supervisor
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.executor.contract import ExecutorError
from lockstep.frontend.engine_handle import CLIENT, EngineHandle
from lockstep.observability.flight_recorder import FlightRecorder
from lockstep.observability.logging import get_logger
from lockstep.protocol.health import QUIET_S
from lockstep.utils import procs
from lockstep.utils.run_folder import RunFolder
from lockstep.utils.words import joined

POLICY = RestartPolicy(first_s=0.1, most_failures=10)  # more than one request can cause (`replays.MOST_DEATHS`)
BELOW_S = 5.0  # how long the processes below a dead engine may take to end by themselves
STUCK_GRACE_S = 60.0  # beyond the longest step: silence that is a hang

_log = get_logger(__name__)


class EngineKeeper:
    """As EngineHandle: make, `wait`, ask `failure` again and again, `close`. `endpoint` and `secret` stay the same."""

    def __init__(
        self, config: EngineConfig, spec: ModelSpec, folder: Path, *, client: str = CLIENT, policy: RestartPolicy = POLICY
    ) -> None:
        """Start the first one."""
        self.config, self._spec, self._model_folder, self._client = config, spec, folder, client
        self._folder, self.secret = RunFolder(), secrets.token_hex(32)
        self.endpoint = f"ipc://{self._folder.path}/engine"
        self.flight = FlightRecorder("server")
        self.flight.listen()
        self._supervisor = Supervisor(1, policy, time.monotonic())
        self._below: list[tuple[int, int]] = []  # processes of the former one
        self._lost_s: float | None = None  # since when there is none that serves
        self.lost_why = ""  # and why
        self._final: ExecutorError | ConfigError | None = None
        self._idle = os.pipe()  # never readable: stands in for a process between two
        self._finalizer = weakref.finalize(self, _end, self._folder, self._idle)
        self._mode = Mode()  # as operators want it: the next one starts so
        self._handle: EngineHandle | None = None
        self._closing: EngineHandle | None = None  # while it is closed
        self._at_once = False
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the process that runs now; 0 between two."""
        return 0 if self._handle is None else self._handle.pid

    @property
    def restarts(self) -> int:
        return self._supervisor.restarts

    def fileno(self) -> int:
        """Readable when there is something for `failure` to see to. It changes."""
        return self._idle[0] if self._handle is None else self._handle.fileno()

    def wait(self) -> None:
        """Until the first one serves. Raises ConfigError or ExecutorError when it does not."""
        assert self._handle is not None
        self._handle.wait()
        self._supervisor.ready(0, time.monotonic())

    def failure(self) -> ExecutorError | ConfigError | None:
        """See to the engine: call it several times a second. Why there is none any more, for good; None while there is, or will be."""
        if self._final is None:
            if self._handle is None:
                self._start_when_due()
            else:
                self._look_at(self._handle)
        return self._final

    def kill(self) -> None:
        """Have `close` wait for no last work of the process. May be called during `close`, by a signal's handler."""
        self._at_once = True
        if self._closing is not None:
            procs.kill_group(self._closing.pid)

    def close(self) -> None:
        """End it and all below it. May be called twice."""
        self._supervisor.stop()
        handle = self._closing = self._handle
        self._handle = None
        if handle is not None:
            if self._at_once:
                procs.kill_group(handle.pid)
            handle.close()
            self._closing = None
            until_s = time.monotonic() + BELOW_S
            while not _ended(handle.below, until_s):
                time.sleep(0.005)
        self._finalizer()

    def _start(self) -> None:
        place = (self._folder.path, self.secret)
        self._handle = EngineHandle(
            *(self.config, self._spec, self._model_folder), client=self._client, place=place, mode=self._mode, restarts=self.restarts
        )
        self.flight.event("engine started", pid=self._handle.pid)

    def _look_at(self, handle: EngineHandle) -> None:
        error, life, now_s = handle.failure(), self._supervisor.lives[0], time.monotonic()
        if handle.ready and life.state is State.STARTING:
            self._supervisor.ready(0, now_s)
            if self._lost_s is not None:
                _log.warning("the engine is back, %.1f s after it was lost", now_s - self._lost_s)
                self._lost_s, self.lost_why = None, ""
        if handle.worked:
            self._supervisor.worked(0)
        if handle.ready:
            self._mode = handle.mode
        if error is None:
            error = self._stuck(handle, now_s)
        if error is None:
            return
        explained = not isinstance(error, ExecutorError) or (error.exitcode is None and error.kind == "died")
        if explained and life.state is State.READY and not handle.again:
            self._final = error
        else:
            self._lose(handle, error, now_s)

    def _stuck(self, handle: EngineHandle, now_s: float) -> ExecutorError | None:
        """Why a process that lives is of no use; None when it is of use."""
        quiet_s, limit_s = now_s - handle.heard_s, self.config.parallel.execute_model_timeout_seconds + STUCK_GRACE_S
        who = f"the engine's process (pid {handle.pid})"
        if quiet_s > QUIET_S and procs.state(handle.pid) == "T":
            message = f"{who} was stopped (SIGSTOP, or a debugger): no sign of life for {quiet_s:.1f} s."
            return ExecutorError(message, phase="engine", kind="stopped", log_tail=handle.stack())
        if handle.late or (handle.ready and quiet_s > limit_s):
            message = f"{who} has given no sign of life for {quiet_s:.1f} s."
            return ExecutorError(message, phase="engine" if handle.ready else "start", kind="hung", log_tail=handle.stack())
        return None

    def _lose(self, handle: EngineHandle, error: Exception, now_s: float) -> None:
        """Be done with a process, and have another one started, unless it is one too many."""
        if isinstance(error, ExecutorError):
            error.phase = error.phase or "engine"
            error.incident = self.flight.dump(self.config.runtime.incident_dir, {"culprit": "engine", **facts(error)})
        self._handle, self._below = None, handle.below
        self._lost_s = now_s if self._lost_s is None else self._lost_s
        self.lost_why = str(error).partition("\n")[0].rstrip(".")
        procs.kill_group(handle.pid)
        handle.close()
        life = self._supervisor.lives[0]
        if self._supervisor.failed(0, now_s) is State.GIVEN_UP:
            self._final = ExecutorError(f"the engine's process died {life.failures} times in a row, the last time: {error}")
            return
        incident = getattr(error, "incident", "")
        story = f"; the whole story: {incident}" if incident else ""
        _log.error("%s%s", joined(str(error), f"It is started again in {max(0.0, life.due_s - now_s):.2f} s"), story)

    def _start_when_due(self) -> None:
        life, now_s = self._supervisor.lives[0], time.monotonic()
        if now_s < life.due_s or not _ended(self._below, life.since_s + BELOW_S):
            return
        self._below = []
        if self._supervisor.due(now_s):
            try:
                self._start()
            except OSError as e:  # no process or descriptor to be had just now
                self._supervisor.failed(0, now_s)
                _log.warning("the engine's process could not be started: %s", e)


def _ended(below: list[tuple[int, int]], until_s: float) -> bool:
    """Whether these processes, whose parent was killed, are gone: by themselves, or from `until_s` on (monotonic) by being killed."""
    left = [pid for pid, born in below if procs.alive(pid, born)]
    if left and time.monotonic() < until_s:
        return False
    for pid in left:
        procs.kill_group(pid)
    return True


def _end(folder: RunFolder, pipe: tuple[int, int]) -> None:
    folder.remove()
    for fd in pipe:
        os.close(fd)
