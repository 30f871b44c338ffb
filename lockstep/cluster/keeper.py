"""A host that keeps replicas for a leader elsewhere: `lockstep generate MODEL --headless -dp 4 -dpl 2 -dpr 2 -dpa ADDRESS`.

Each replica in turns, on a thread of its own: connect, greet (see `greeting`), give the connection to a replica's process, and
wait for that to end. How it ended says what is next:

    the leader said stop          the leader is done: so are we (exit code 0)
    the leader cannot be reached  connect again, until nobody listens there any more (exit code 1)
    anything else                 the process died: after a pause, a new connection and a new process

When to have done with a replica that dies again and again is the leader's to say, which knows what it did meanwhile: it refuses
its next connection. The pause doubles with each death in a row of a process that had brought no tokens (it tells, see
`wire.Worked`); to lose the leader is no fault of the process.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from lockstep.cluster import greeting
from lockstep.cluster.doorman import GREETING_S
from lockstep.cluster.greeting import Identity, RefusedError
from lockstep.cluster.replica import STOP_S, end_process, start_process
from lockstep.cluster.replica_main import LOST_ROUTER
from lockstep.cluster.supervisor import RestartPolicy
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.config.nodes import chosen_address, meeting_point
from lockstep.config.tree import EngineConfig
from lockstep.executor.contract import ExecutorError
from lockstep.observability.logging import get_logger
from lockstep.utils import env, net, procs

CONNECT_S = 5.0
GONE_S = 5.0  # a leader that was there and at whose port nobody listens for so long has ended
TAKEN_SILENCES = 2  # for so many times the longest silence, who held our place may be gone and not be missed yet
MOST_PAUSE_S = 2.0
PAUSES = RestartPolicy()

_log = get_logger(__name__)


def keep_replicas(config: EngineConfig, spec: ModelSpec, folder: Path, *, key: str | None = None) -> int:
    """Keep this host's replicas until the leader ends: 0. `config` is as `resolve(..., headless=True)` returns it.

    key: shared with the leader; None: LOCKSTEP_CLUSTER_KEY.

    Raises ConfigError when the leader refuses them, ExecutorError when it is not there, or not any more.
    """
    keeper = Keeper(config, spec, folder, key)
    patience_s = 0.0
    try:
        keeper.run()
        patience_s = STOP_S
    finally:
        keeper.close(patience_s)
    return 0


@dataclass(frozen=True)
class _End:
    """The end of keeping one replica. decisive: of all of them. error: None when the leader said so."""

    error: Exception | None
    decisive: bool


class Keeper:
    """Keeps replicas `data_parallel_start_rank` and on."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, folder: Path, key: str | None = None) -> None:
        self._config, self._spec, self._folder = config, spec, folder
        parallel = config.parallel
        self._replicas = range(parallel.data_parallel_start_rank or 0, (parallel.data_parallel_start_rank or 0) + parallel.local_replicas)
        self._leader = (parallel.data_parallel_address, parallel.data_parallel_rpc_port)
        self.at = f"{self._leader[0]}:{self._leader[1]}"
        self._silence_s = greeting.silence_s(parallel)
        self._key, self._name = env.cluster_key() if key is None else key, os.urandom(16)
        self._settings = greeting.agreed_settings(config, spec, folder)
        self._death_pipe = os.pipe()
        self._lock = threading.Lock()
        self._stopping = threading.Event()  # set with the lock held: no process is started after it
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._ends: queue.SimpleQueue[_End] = queue.SimpleQueue()
        if not self._key and not net.is_loopback(self._leader[0]):
            _log.warning("LOCKSTEP_CLUSTER_KEY is not set: whoever answers at %s is obeyed; set the same secret on every host.", self.at)

    def run(self) -> None:
        """Until the leader ends. Raises as `keep_replicas` says."""
        for replica in self._replicas:
            threading.Thread(target=self._keep, args=(replica,), name=f"replica-{replica}", daemon=True).start()
        for _ in self._replicas:
            end = self._ends.get()
            if end.decisive and end.error is None:
                return
            if end.decisive:
                break
            _log.warning("%s", end.error)
        assert end.error is not None
        raise end.error

    def close(self, patience_s: float) -> None:
        """End every replica, after waiting so long for them to end by themselves. Never raises."""
        with self._lock:
            self._stopping.set()
        until = time.monotonic() + patience_s
        for process in self._processes.values():
            end_process(process, max(0.0, until - time.monotonic()))
        for fd in self._death_pipe:
            with contextlib.suppress(OSError):
                os.close(fd)

    # --- on each replica's thread ---

    def _keep(self, replica: int) -> None:
        welcomed, deaths = False, 0
        try:
            while not self._stopping.is_set():
                connection = self._connect(replica, welcomed)
                if connection is None:
                    return
                welcomed = True
                _log.info("replica %d is connected to the leader at %s", replica, self.at)
                code, worked = self._serve(replica, connection)
                if code == 0:
                    self._ends.put(_End(None, decisive=True))
                    return
                if self._stopping.is_set():
                    return
                cause = "it lost the leader" if code == LOST_ROUTER else procs.exit_cause(code)
                deaths = (0 if worked else deaths) + (code != LOST_ROUTER)
                pause_s = PAUSES.pause_s(max(1, deaths))
                _log.warning("replica %d ended (%s): it is started again in %.2f s", replica, cause, pause_s)
                self._stopping.wait(pause_s)
        except RefusedError as e:
            error = ConfigError(f"the leader at {self.at} refused replica {replica}: {e}.")
            self._ends.put(_End(error, decisive=not welcomed))
        except Exception as e:
            self._ends.put(_End(e, decisive=True))

    def _serve(self, replica: int, connection: socket.socket) -> tuple[int, bool]:
        """Run a replica's process on the connection: (its exit code, whether it brought tokens)."""
        with connection, self._lock:
            if self._stopping.is_set():
                return LOST_ROUTER, False
            process, ours = start_process(self._config, self._spec, self._folder, replica, self._death_pipe[0], connection)
            self._processes[replica] = process
        with ours:
            code = process.wait()
            ours.setblocking(False)
            with contextlib.suppress(OSError):
                return code, bool(ours.recv(1))  # it says but one thing
            return code, False

    def _connect(self, replica: int, welcomed: bool) -> socket.socket | None:
        """A connection on which the leader has said welcome; None when we are to stop. Raises RefusedError, ExecutorError."""
        began_s, pause_s = time.monotonic(), 0.05
        limit_s = self._config.runtime.startup_timeout_seconds
        closed_s: float | None = None  # since when nobody listens there
        told = False
        while not self._stopping.is_set():
            try:
                return self._knock(replica)
            except RefusedError as e:
                if not e.again or time.monotonic() - began_s > TAKEN_SILENCES * self._silence_s:
                    raise
                if not told:
                    _log.warning("the leader at %s refuses replica %d for now: %s", self.at, replica, e)
                told, why, closed_s = True, str(e), None
            except OSError as e:
                why = e.strerror or str(e)
                now_s = time.monotonic()
                closed_s = (closed_s or now_s) if isinstance(e, ConnectionRefusedError) else None
                if welcomed and closed_s is not None and now_s - closed_s > GONE_S:
                    raise ExecutorError(f"the leader at {self.at} is gone: nobody listens there any more.", kind="died") from None
            if time.monotonic() - began_s > limit_s:
                hint = "" if welcomed else f" Start the leader, with the same {' and '.join(meeting_point(self._config.parallel))}."
                raise ExecutorError(
                    f"the leader at {self.at} was not reached in startup_timeout_seconds={limit_s:g}: {why}.{hint}", kind="hung"
                )
            self._stopping.wait(pause_s)
            pause_s = min(MOST_PAUSE_S, 2 * pause_s)
        return None

    def _knock(self, replica: int) -> socket.socket:
        """One attempt. Raises RefusedError, or OSError when nobody answers as a leader does."""
        own = chosen_address()
        connection = socket.create_connection(self._leader, CONNECT_S, source_address=(own, 0) if own else None)
        try:
            net.prepare_link(connection, self._silence_s)
            lockstep, torch = greeting.versions()
            who = Identity(replica, self._name, socket.gethostname(), os.getpid(), lockstep, torch, self._settings)
            greeting.greet(connection, self._key, who, time.monotonic() + GREETING_S)
        except BaseException:
            connection.close()
            raise
        return connection
