"""The engine's process as its parent holds it: started, waited for, ended."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

import lockstep
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.executor.contract import ExecutorError
from lockstep.frontend import engine_wire as wire
from lockstep.frontend.engine_process import Failed, Ready, decode_word
from lockstep.utils import env, procs
from lockstep.utils.frames import Channel, send_one

CLIENT = "lockstep.cluster.factory:make_supervised"
LAUNCH_S = 30.0  # to read what it is
STOP_S = 8.0  # a stopping engine ends its replicas, and they their ranks
GRACE_S = 30.0  # the engine times its start itself and knows who is late: let it speak first


class EngineHandle:
    """One start of the engine's process. Make, `wait`, and `close` however it ends.

    `endpoint` and `secret` are what an API process needs to connect. They are in no argument list and no environment.
    """

    def __init__(self, config: EngineConfig, spec: ModelSpec, folder: Path, *, client: str = CLIENT) -> None:
        """Start it. client: "module:function" that makes its EngineClient from (config, spec, folder)."""
        self._folder = tempfile.mkdtemp(prefix="lockstep-")  # of mode 0700
        self.endpoint, self.secret = f"ipc://{self._folder}/engine", secrets.token_hex(32)
        self._limit_s = config.runtime.startup_timeout_seconds + GRACE_S
        self._death_pipe = os.pipe()
        ours, theirs = socket.socketpair()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lockstep.frontend.engine_process", str(theirs.fileno()), str(self._death_pipe[0])],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[theirs.fileno(), self._death_pipe[0]],
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
            sys_path=[path or os.getcwd() for path in sys.path],
            endpoint=self.endpoint,
            secret=self.secret,
            client=client,
        )
        with contextlib.suppress(OSError):  # dead already: the connection's end says so
            send_one(ours, wire.encode(launch), time.monotonic() + LAUNCH_S)
        self._channel: Channel[Ready | Failed] = Channel(ours, decode_word)
        self._finalizer = weakref.finalize(self, _end, self.process, self._channel, self._death_pipe, self._folder)

    def fileno(self) -> int:
        """Readable when the process says how it goes, and when it is gone."""
        return self._channel.fileno()

    def wait(self) -> None:
        """Until it serves. Raises ConfigError or ExecutorError when it does not."""
        deadline = time.monotonic() + self._limit_s
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
            if isinstance(word, Failed):
                return ConfigError(word.message) if word.user else ExecutorError(word.message, log_tail=word.log_tail)
        return None

    def _unexplained(self) -> ExecutorError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        code = self.process.returncode
        return ExecutorError(f"the engine's process (pid {self.pid}) died: {procs.exit_cause(code)}.", exitcode=code, kind="died")

    def close(self) -> None:
        """End it and all below it. May be called twice."""
        self._finalizer()

    def _free(self) -> None:
        for fd in self._death_pipe:
            os.close(fd)
        shutil.rmtree(self._folder, ignore_errors=True)


def _end(process: subprocess.Popen[bytes], channel: Channel[Ready | Failed], death_pipe: tuple[int, int], folder: str) -> None:
    """Its end of the death pipe goes first: it, its replicas and their ranks end by that, whatever they are at."""
    channel.close()
    for fd in death_pipe:
        os.close(fd)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    procs.kill_group(process.pid)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(2.0)
    shutil.rmtree(folder, ignore_errors=True)


def _environment() -> dict[str, str]:
    here = str(Path(lockstep.__file__).resolve().parents[1])
    base = env.child_environment(PYTHONUNBUFFERED="1")
    base["PYTHONPATH"] = os.pathsep.join(p for p in (here, base.get("PYTHONPATH", "")) if p)
    return base
