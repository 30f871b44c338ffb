"""Starting worker processes, and holding on to them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

import lockstep
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.distributed.message_queue import MessageQueue, QueueHandle
from lockstep.distributed.progress import ProgressBoard
from lockstep.executor import affinity, wire
from lockstep.executor.failure import LogTail
from lockstep.kernels.library import library
from lockstep.utils import env, procs, shared_files
from lockstep.utils.cores import RankCores
from lockstep.utils.net import Listener
from lockstep.utils.shm import SharedBytes


@dataclass
class WorkerProcess:
    """One rank's process as the driver sees it. Written by the monitor thread only."""

    rank: int
    process: subprocess.Popen[bytes]
    reply: socket.socket
    log_fd: int  # read end of its standard output and error
    pid_fd: int  # readable when it is dead; -1 where the system has none
    frames: wire.FrameReader = field(default_factory=wire.FrameReader)
    tail: LogTail = field(default_factory=LogTail)
    ready: bool = False
    born: int = 0  # see `procs.birth`
    where: str = ""  # the host, in words, when it is another one

    @property
    def pid(self) -> int:
        return self.process.pid

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self.process.poll()

    def state(self) -> str:
        """The kernel's letter, see `procs.state`."""
        return procs.state(self.pid)

    def close(self) -> None:
        """Close the driver's ends."""
        self.reply.close()
        for fd in (self.log_fd, self.pid_fd):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.close(fd)
        self.log_fd = self.pid_fd = -1


@dataclass(frozen=True)
class Plan:
    """What all ranks of an executor have in common."""

    config: EngineConfig
    spec: ModelSpec
    folder: Path
    worker_cls: str
    leads_only: bool = False  # this process runs no rank of its own: all are on other nodes
    again: bool = False  # also when these ranks do not get ready, this process is followed by another that starts them anew

    @property
    def world_size(self) -> int:
        return self.config.parallel.world_size

    @property
    def output_rank(self) -> int:
        """The first tensor-parallel rank of the last pipeline stage."""
        return self.world_size - self.config.parallel.stage_size

    @property
    def ranks(self) -> range:
        """The ranks on this host."""
        return range(0) if self.leads_only else self.config.parallel.local_ranks


@dataclass(frozen=True)
class Channels:
    """How driver and ranks reach each other."""

    queue: MessageQueue  # orders
    results: QueueHandle | None  # of steps, from the output rank; None: they come through its reply socket
    board: ProgressBoard
    death_fd: int  # the read end of a pipe whose write end only the driver has
    rendezvous: tuple[str, int]
    listener: Listener | None = None  # rank 0 serves the rendezvous on it


def spawn(plan: Plan, rank: int, share: RankCores, channels: Channels) -> WorkerProcess:
    """Start one rank: a fresh interpreter that is told everything through inherited descriptors.

    Nothing is imported from the caller's main module, nothing listens, and the process gets a group of its own, so that
    signals of the terminal do not reach it and one signal ends it with all its children.
    """
    ours, theirs = socket.socketpair()
    log_read, log_write = os.pipe()
    local = rank - plan.ranks.start
    handle = channels.queue.handle(local)
    results = channels.results if rank == plan.output_rank else None
    listen_fd = channels.listener.fileno() if rank == 0 and channels.listener is not None else -1
    launch = wire.Launch(
        rank=rank,
        local_rank=local,
        world_size=plan.world_size,
        output_rank=plan.output_rank,
        parent_pid=os.getpid(),
        death_fd=channels.death_fd,
        reply_fd=theirs.fileno(),
        queue=handle,
        results=results,
        board=channels.board.handle,
        share=share,
        worker_cls=plan.worker_cls,
        sys_path=[path or os.getcwd() for path in sys.path],
        rendezvous=channels.rendezvous,
        listen_fd=listen_fd,
        config=plan.config,
        spec=plan.spec,
        folder=str(plan.folder),
    )
    text = msgspec.msgpack.encode(launch)
    letter = SharedBytes.create(len(text))
    letter.buffer[:] = text
    passed = [letter.fd, channels.death_fd, theirs.fileno(), channels.board.handle.fd, *handle.fds]
    passed += [*(results.fds if results is not None else ()), *([listen_fd] if listen_fd >= 0 else [])]
    channels.board.cell(local).set(phase="spawn")
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "lockstep.executor.worker_main", str(letter.fd), f"rank={rank}"],
            stdin=subprocess.DEVNULL,
            stdout=log_write,
            stderr=log_write,
            pass_fds=passed,
            start_new_session=True,
            env=_environment(share.threads),
        )
    except BaseException:
        ours.close()
        os.close(log_read)
        raise
    finally:
        theirs.close()
        os.close(log_write)
        letter.close()
    ours.setblocking(False)
    os.set_blocking(log_read, False)
    return WorkerProcess(rank, process, ours, log_read, _pid_fd(process.pid), born=procs.birth(process.pid))


class Process(Protocol):
    """A rank's process, here or on another host."""

    rank: int

    def exit_code(self) -> int | None: ...


AnyProcess = TypeVar("AnyProcess", bound=Process)


def exit_codes(workers: Sequence[AnyProcess]) -> list[tuple[AnyProcess, int]]:
    """The workers that have ended, with their exit codes. Those a signal from outside killed come before those that
    aborted: an abort is what a peer's death does to the others."""
    ended = [(w, code) for w in workers if (code := w.exit_code()) is not None]
    return sorted(ended, key=lambda pair: (pair[1] >= 0, pair[1] == -6, pair[0].rank))


def kill_all(workers: Sequence[WorkerProcess]) -> None:
    """End every worker and its children now, reap them, and remove what they could not."""
    for worker in workers:
        procs.kill_group(worker.pid)
    for worker in workers:
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process stuck in a device driver: not ours to wait for
            worker.process.wait(timeout=2.0)
        shared_files.remove_of(worker.pid, worker.born)


def _environment(threads: int) -> dict[str, str]:
    here = str(Path(lockstep.__file__).resolve().parents[1])
    base = env.child_environment(PYTHONUNBUFFERED="1", **affinity.thread_environment(threads))
    if library() is None:  # said once, by this process
        base["LOCKSTEP_KERNELS"] = "torch"
    base["PYTHONPATH"] = os.pathsep.join(p for p in (here, base.get("PYTHONPATH", "")) if p)
    return base


def _pid_fd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1
