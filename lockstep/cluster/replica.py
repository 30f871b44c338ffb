"""A replica as the router holds it: its channel and what it last said; and on this host its process."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import lockstep
from lockstep.cluster import wire
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.executor.contract import ExecutorError
from lockstep.protocol.health import RankHealth
from lockstep.utils import env, procs, stacks
from lockstep.utils.frames import Channel, send_one

STOP_S = 6.0  # how long a replica may take to end its ranks
LEAVE_S = 1.0  # ... and once it has hung up, its process
LAUNCH_S = 30.0  # ... and to read what it is; more than a few KB wait for that


class ReplicaHandle(ABC):
    """One start of one replica. `fileno` is readable when it has something to say or is gone."""

    pid: int  # of its process; 0 on another host

    def __init__(self, replica: int, channel: Channel[Any]) -> None:
        self.replica, self.channel = replica, channel  # its number over all hosts
        self.failed: wire.Failed | None = None  # its last words, if it had any
        self.inbox: deque[Any] = deque()  # said, and not taken yet
        self.heard_s = self.spoke_s = time.monotonic()  # when it last said anything, or had nothing to say; when it last said anything
        self.ranks: list[RankHealth] = []  # how its ranks were then
        self.blame: ExecutorError | None = None  # why it was given up here, in full
        self.why = ""  # that it was given up here, where it says nothing itself
        self.listens = True  # whether it would hear an order to stop

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"replica {self.replica}"

    def fileno(self) -> int:
        return self.channel.fileno()

    def error(self) -> ExecutorError:
        """Why it is gone: what it said, or how it ended."""
        said = self.failed
        if said is None and self.blame is not None:
            return self.blame
        if said is None and self.why:
            return ExecutorError(f"{self.name} {self.why}.", kind="hung")
        if said is None:
            return self.unexplained()
        error = ExecutorError(
            f"{self.name}: {said.message}",
            rank=said.rank,
            phase=said.phase,
            exitcode=said.exitcode,
            kind=said.kind,
            error_type=said.error_type,
            log_tail=said.log_tail,
            ranks=said.ranks,
        )
        error.incident = said.incident
        return error

    def stack(self) -> list[str]:
        """The Python stack of a process of this host that is stuck, as lines; [] where it cannot be had. It goes on, to its end."""
        return []

    def ask(self) -> None:
        """Ask it to stop; `end` waits for it."""
        with contextlib.suppress(OSError):
            self.channel.send(wire.encode(wire.Stop()))

    @abstractmethod
    def unexplained(self) -> ExecutorError:
        """Why it is gone, when it said nothing."""

    @abstractmethod
    def end(self, ask: bool, until_s: float) -> None:
        """Be done with it, politely until `until_s` of the monotonic clock if it was asked. Never raises, may be called twice."""


class ReplicaProcess(ReplicaHandle):
    """A replica on this host: a process with ranks of its own."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, folder: Path, replica: int, death_fd: int, *, again: bool) -> None:
        """Start it. It is ready when it says `wire.Ready`. again: another one is started also when this start fails."""
        self._stack_file = tempfile.TemporaryFile("w+b", buffering=0)  # noqa: SIM115 - closed by `end`
        self.process, ours = start_process(config, spec, folder, replica, death_fd, stack_fd=self._stack_file.fileno(), again=again)
        super().__init__(replica, Channel(ours, wire.decode_reply))
        self.pid = self.process.pid

    def unexplained(self) -> ExecutorError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1.0)
        cause = procs.exit_cause(self.process.returncode)
        return ExecutorError(f"{self.name} (pid {self.pid}) died: {cause}.", exitcode=self.process.returncode, kind="died")

    def stack(self) -> list[str]:
        return stacks.written(self.pid, self._stack_file)

    def end(self, ask: bool, until_s: float) -> None:
        # It may be in the middle of telling us something, and the order to stop behind others: move both along.
        with contextlib.suppress(OSError, ValueError):  # ValueError: it may say what we do not know
            while ask and self.process.poll() is None and time.monotonic() < until_s:
                self.channel.flush()
                if self.channel.wait(0.02):
                    self.channel.receive()
        end_process(self.process, max(0.0, min(until_s - time.monotonic(), LEAVE_S)) if ask else 0.0)
        self.channel.close()
        self._stack_file.close()


def start_process(
    config: EngineConfig,
    spec: ModelSpec,
    folder: Path,
    replica: int,
    death_fd: int,
    router: socket.socket | None = None,
    stack_fd: int = 2,
    again: bool = True,
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a replica's process and tell it what it is. router: its connection to the router; without one, it is the one returned.

    stack_fd: where it writes its Python stack when it gets SIGUSR1. again: another one is started also when this start fails.

    The process ends when the last other end of `death_fd` is closed. -> (the process, our end of a connection to it)
    """
    ours, theirs = socket.socketpair()
    inherited = [theirs.fileno(), death_fd, stack_fd, *([router.fileno()] if router is not None else [])]
    try:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "lockstep.cluster.replica_main",
                str(theirs.fileno()),
                str(death_fd),
                str(stack_fd),
                f"replica={replica}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what ranks print is no output of this program
            pass_fds=inherited,
            start_new_session=True,
            env=_environment(),
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    launch = wire.Launch(
        config=replace(config, parallel=replace(config.parallel, data_parallel_rank=replica)),
        spec=spec,
        folder=str(folder),
        parent_pid=os.getpid(),
        follow_thread=threading.current_thread() is threading.main_thread(),
        sys_path=[path or os.getcwd() for path in sys.path],
        router_fd=None if router is None else router.fileno(),
        again=again,
    )
    with contextlib.suppress(OSError):  # dead already: the connection's end says so
        send_one(ours, wire.encode(launch), time.monotonic() + LAUNCH_S)
    return process, ours


def end_process(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """Wait so long for a replica's process to end by itself, then end it and its ranks."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    procs.kill_group(process.pid)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(2.0)


def _environment() -> dict[str, str]:
    here = str(Path(lockstep.__file__).resolve().parents[1])
    base = env.child_environment(PYTHONUNBUFFERED="1")
    base["PYTHONPATH"] = os.pathsep.join(p for p in (here, base.get("PYTHONPATH", "")) if p)
    return base
