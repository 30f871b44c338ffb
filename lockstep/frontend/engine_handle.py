"""The engine's process as its parent holds it: started, waited for, ended."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import IO

import lockstep
from lockstep.cluster.operate import Mode
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.executor.contract import ExecutorError
from lockstep.frontend import engine_wire as wire
from lockstep.frontend.engine_process import Alive, Failed, Ready, decode_word
from lockstep.utils import env, procs, stacks
from lockstep.utils.frames import Channel, send_one
from lockstep.utils.run_folder import RunFolder

CLIENT = "lockstep.cluster.factory:make_supervised"
AWAKE = Mode()
LAUNCH_S = 30.0  # to read what it is
STOP_S = 8.0  # a stopping engine ends its replicas, and they their ranks
GRACE_S = 30.0  # the engine times its start itself and knows who is late: let it speak first


class EngineHandle:
    """One start of the engine's process. Make, `wait`, and `close` however it ends.

    `endpoint` and `secret` are what an API process needs to connect. They are in no argument list and no environment.
    """

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        folder: Path,
        *,
        client: str = CLIENT,
        place: tuple[str, str] | None = None,
        mode: Mode = AWAKE,
        restarts: int = 0,
    ) -> None:
        """Start it. client: "module:function" that makes its EngineClient from (config, spec, folder, replaced=...).

        place: the folder of its endpoint, which stays, and the secret; default: new ones. mode: how it starts. restarts: before it.
        """
        self._folder = RunFolder() if place is None else None
        self.endpoint = f"ipc://{self._folder.path if self._folder else (place or ('',))[0]}/engine"
        self.secret = secrets.token_hex(32) if place is None else place[1]
        self.ready, self.worked, self.below, self.heard_s = False, False, list[tuple[int, int]](), time.monotonic()
        self.mode, self.again = mode, False  # again: it said that another one may do better
        self._started_s = self.heard_s
        self.stack_file = tempfile.TemporaryFile("w+b", buffering=0)  # noqa: SIM115 - closed by `close`
        self._limit_s = config.start_limit_s + GRACE_S
        self._death_pipe = os.pipe()
        ours, theirs = socket.socketpair()
        fds = [theirs.fileno(), self._death_pipe[0], self.stack_file.fileno()]
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lockstep.frontend.engine_process", *map(str, fds)],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=fds,
                start_new_session=True,
                env=_environment(),
            )
        except BaseException:
            ours.close()
            self._free()
            raise
        finally:
            theirs.close()
        self.pid = self.process.pid
        launch = wire.Launch(
            config=config,
            spec=spec,
            folder=str(folder),
            parent_pid=os.getpid(),
            follow_thread=threading.current_thread() is threading.main_thread(),
            sys_path=[path or os.getcwd() for path in sys.path],
            endpoint=self.endpoint,
            secret=self.secret,
            client=client,
            paused=mode.paused,
            sleep_level=mode.sleep_level,
            restarts=restarts,
        )
        with contextlib.suppress(OSError):  # dead already: the connection's end says so
            send_one(ours, wire.encode(launch), time.monotonic() + LAUNCH_S)
        self._channel: Channel[Ready | Failed | Alive] = Channel(ours, decode_word)
        self._helped = config.parallel.nnodes > 1 or config.parallel.replicas_led < config.parallel.replicas_served  # by other hosts
        self._finalizer = weakref.finalize(self, _end, self.process, self._channel, self.stack_file, self._death_pipe, self._folder)

    def fileno(self) -> int:
        """Readable when the process says how it goes, and when it is gone."""
        return self._channel.fileno()

    @property
    def late(self) -> bool:
        """Whether it should serve by now, and does not."""
        return not self.ready and time.monotonic() - self._started_s > self._limit_s

    def stack(self) -> list[str]:
        """The Python stack of a process that is stuck, as lines. One that was stopped goes on, to its end."""
        return stacks.written(self.pid, self.stack_file)

    def wait(self) -> None:
        """Until it serves. Raises ConfigError or ExecutorError when it does not."""
        deadline = self._started_s + self._limit_s
        while not self._channel.wait(max(0.0, min(1.0, deadline - time.monotonic()))):
            if time.monotonic() > deadline:
                raise ExecutorError(f"the engine was not ready after {self._limit_s:g} s.", phase="start", kind="hung")
        failure = self.failure()
        if failure is not None:
            raise failure

    def failure(self) -> ExecutorError | ConfigError | None:
        """Why the engine runs no more; None while it does."""
        try:
            words = self._channel.receive() if self._channel.wait(0.0) else []
        except ConnectionError:
            return self._unexplained()
        for word in words:
            self.heard_s = time.monotonic()
            if isinstance(word, Ready):
                self.ready = True
            elif isinstance(word, Alive):
                self.below, self.worked = word.below, word.worked
                self.mode = Mode(word.paused, word.sleep_level)
            elif isinstance(word, Failed):
                self.again = word.again
                return ConfigError(word.message) if word.user else ExecutorError(word.message, log_tail=word.log_tail)
        return None

    def _unexplained(self) -> ExecutorError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        code = self.process.returncode
        return ExecutorError(f"the engine's process (pid {self.pid}) died: {procs.exit_cause(code)}.", exitcode=code, kind="died")

    def close(self) -> None:
        """End it and all below it. May be called twice."""
        if self._helped and self.ready and self._finalizer.alive:
            self._channel.close()  # it ends by itself, so that other hosts hear that the end is meant
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        self._finalizer()

    def _free(self) -> None:
        for fd in self._death_pipe:
            os.close(fd)
        self.stack_file.close()
        if self._folder is not None:
            self._folder.remove()


def _end(
    process: subprocess.Popen[bytes],
    channel: Channel[Ready | Failed | Alive],
    stack_file: IO[bytes],
    death_pipe: tuple[int, int],
    folder: RunFolder | None,
) -> None:
    """Its end of the death pipe goes first: it, its replicas and their ranks end by that, whatever they are at."""
    channel.close()
    stack_file.close()
    for fd in death_pipe:
        os.close(fd)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    procs.kill_group(process.pid)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(2.0)
    if folder is not None:
        folder.remove()


def _environment() -> dict[str, str]:
    here = str(Path(lockstep.__file__).resolve().parents[1])
    base = env.child_environment(PYTHONUNBUFFERED="1")
    base["PYTHONPATH"] = os.pathsep.join(p for p in (here, base.get("PYTHONPATH", "")) if p)
    return base
