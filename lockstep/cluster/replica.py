"""A replica as the router holds it: its process, its channel, and what the process last said."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lockstep
from lockstep.cluster import wire
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.executor.contract import ExecutorError
from lockstep.utils import env, procs
from lockstep.utils.frames import Channel

STOP_S = 6.0  # how long a replica may take to end its ranks


class ReplicaProcess:
    """One start of one replica. `fileno` is readable when it has something to say or is gone."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, folder: Path, replica: int, death_fd: int) -> None:
        """Start it. It is ready when it says `wire.Ready`."""
        self.replica = replica
        ours, theirs = socket.socketpair()
        config = replace(config, parallel=replace(config.parallel, data_parallel_rank=replica))
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lockstep.cluster.replica_main", str(theirs.fileno()), str(death_fd), f"replica={replica}"],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what ranks print is no output of this program
                pass_fds=(theirs.fileno(), death_fd),
                start_new_session=True,
                env=_environment(),
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.channel: Channel[Any] = Channel(ours, wire.decode_reply)
        self.failed: wire.Failed | None = None  # its last words, if it had any
        sys_path = [path or os.getcwd() for path in sys.path]
        launch = wire.Launch(config=config, spec=spec, folder=str(folder), parent_pid=os.getpid(), sys_path=sys_path)
        with contextlib.suppress(ConnectionError):  # dead already: its channel says so
            self.channel.send(wire.encode(launch))

    @property
    def pid(self) -> int:
        return self.process.pid

    def fileno(self) -> int:
        return self.channel.fileno()

    def error(self) -> ExecutorError:
        """Why it is gone: what it said, or how it ended."""
        said = self.failed
        if said is not None:
            return ExecutorError(
                f"replica {self.replica}: {said.message}",
                rank=said.rank,
                phase=said.phase,
                exitcode=said.exitcode,
                kind=said.kind,
                error_type=said.error_type,
                log_tail=said.log_tail,
            )
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        cause = procs.exit_cause(self.process.returncode)
        message = f"replica {self.replica} (pid {self.pid}) died: {cause}."
        return ExecutorError(message, exitcode=self.process.returncode, kind="died")

    def ask(self) -> None:
        """Ask it to stop; `end` waits for it."""
        with contextlib.suppress(OSError):
            self.channel.send(wire.encode(wire.Stop()))

    def end(self, ask: bool) -> None:
        """Stop the process and its ranks, politely if it was asked. Never raises, may be called twice."""
        if ask:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        procs.kill_group(self.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2.0)
        self.channel.close()


def _environment() -> dict[str, str]:
    here = str(Path(lockstep.__file__).resolve().parents[1])
    base = env.child_environment(PYTHONUNBUFFERED="1")
    base["PYTHONPATH"] = os.pathsep.join(p for p in (here, base.get("PYTHONPATH", "")) if p)
    return base
