"""The process that has imported torch and forks ranks on demand: `python -m lockstep.testing.zygote FD PARENT`.

One thread, one loop. It watches its parent's socket all the time: end-of-file kills the ranks and ends it. Ranks die with
the zygote (parent-death signal) and lead their own process groups, so that their children die with them.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from lockstep.testing.zygote_rank import rank_main
from lockstep.testing.zygote_wire import Frames
from lockstep.utils import procs
from lockstep.utils.net import Listener

_GRACE_S = 1.0  # for the others to report on their own after one rank failed
_STACKS_S = 0.5  # for a stuck rank to write its stacks before it is killed


@dataclass
class Rank:
    """One forked rank. `pipe` delivers its report; `output` is a file with what it printed."""

    rank: int
    pid: int
    pipe: int
    output: int
    data: bytearray = field(default_factory=bytearray)
    report: dict[str, Any] | None = None
    killed_for: str = ""


class Job:
    """One call on `world_size` ranks, from fork to the last report."""

    def __init__(self, request: dict[str, Any], listener: Listener, control: Frames) -> None:
        self.request = request
        self.deadline = time.monotonic() + float(request["timeout"])
        self.ranks = [self._fork(rank, listener, control) for rank in range(int(request["world_size"]))]

    def _fork(self, rank: int, listener: Listener, control: Frames) -> Rank:
        read, write = os.pipe()
        output = os.memfd_create(f"rank{rank}") if hasattr(os, "memfd_create") else os.open(os.devnull, os.O_RDWR)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            os.close(control.fileno())
            rank_main(self.request, rank, listener, write, output, parent)  # never returns
        os.close(write)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return Rank(rank, pid, read, output)

    @property
    def waiting(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.report is None]

    def pump(self, timeout_s: float, control: Frames) -> bool:
        """Read what ranks report for at most `timeout_s`. False when the parent is gone."""
        ready = select.select([control, *(rank.pipe for rank in self.waiting)], [], [], max(0.0, timeout_s))[0]
        for rank in self.waiting:
            if rank.pipe in ready:
                chunk = os.read(rank.pipe, 1 << 20)
                rank.data += chunk
                if not chunk:
                    self._finish(rank)
        return control not in ready

    def _finish(self, rank: Rank) -> None:
        """Its pipe is closed: it has reported, or it is dying."""
        import msgspec

        status = os.waitpid(rank.pid, 0)[1]
        procs.kill_group(rank.pid)  # what the rank left behind
        if rank.data:
            rank.report = msgspec.msgpack.decode(rank.data)
        else:
            cause = procs.exit_cause(os.waitstatus_to_exitcode(status))
            kind = rank.killed_for or "died"
            said = {"timeout": f"still running after {self.request['timeout']} s", "killed": "killed because another rank failed"}
            rank.report = {"ok": False, "error_type": kind, "message": said.get(kind, cause), "traceback": "", "when": time.time()}
        assert rank.report is not None
        rank.report["output"] = _contents(rank.output)
        if rank.killed_for == "timeout" and not rank.report["ok"]:
            rank.report["traceback"] = rank.report["output"]
            rank.report["output"] = ""
        os.close(rank.pipe)
        os.close(rank.output)

    def kill(self, reason: str) -> None:
        """End every rank that still runs; for a timeout, after it wrote its stacks."""
        for rank in self.waiting:
            rank.killed_for = reason
        if reason == "timeout":
            for rank in self.waiting:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGCONT)
                    os.kill(rank.pid, signal.SIGUSR1)
            time.sleep(_STACKS_S)
        for rank in self.waiting:
            procs.kill_group(rank.pid)

    def run(self, control: Frames) -> bool:
        """Until every rank has a report. False when the parent is gone (everything is killed then)."""
        grace: float | None = None
        while self.waiting:
            limit = self.deadline if grace is None else min(self.deadline, grace)
            if not self.pump(min(limit - time.monotonic(), 0.5), control):
                self.kill("killed")
                return False
            failed = any(rank.report is not None and not rank.report["ok"] for rank in self.ranks)
            if failed and grace is None and not self.request["wait_all"]:
                grace = time.monotonic() + _GRACE_S
            if self.waiting and time.monotonic() >= limit and not self.waiting[0].killed_for:
                self.kill("timeout" if time.monotonic() >= self.deadline else "killed")
                grace, self.deadline = None, time.monotonic() + 10
        return True


def _contents(fd: int) -> str:
    size = os.fstat(fd).st_size
    return os.pread(fd, min(size, 64 << 10), max(0, size - (64 << 10))).decode(errors="replace")


def _preload(modules: list[str]) -> None:
    for name in modules:
        with contextlib.suppress(ImportError):  # the rank that needs it says so better
            importlib.import_module(name)


def main() -> None:
    control = Frames(socket.socket(fileno=int(sys.argv[1])))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _preload(["numpy", "torch", "torch.distributed", "lockstep.distributed.parallel_state"])
    while True:
        if os.getppid() != int(sys.argv[2]):
            return
        request = control.receive()
        if request is None:
            return
        _preload(request["preload"])
        gc.collect()
        gc.freeze()  # forked ranks share these pages for as long as nobody walks them
        with Listener() as listener:
            job = Job(request, listener, control)
        if not job.run(control):
            return
        control.send({"ranks": [rank.report for rank in job.ranks]})


if __name__ == "__main__":
    main()
