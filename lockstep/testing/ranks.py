"""Run a function on N ranks, each a real process, in a fraction of a second.

Importing torch costs seconds; a *zygote* process pays it once and forks a rank whenever one is needed. Arguments and
results cross as data (`distributed.codec`: numbers, text, lists, tuples, dicts, tensors, arrays).

    results = run_ranks("tests.distributed.sums:total", 2, 41)   # def total(rank, world_size, n): ...
"""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from lockstep.testing.zygote_wire import Frames

_SLACK_S = 20.0  # for the zygote to kill, collect and report


class RankError(RuntimeError):
    """A rank raised, died or ran out of time. `rank` is the first to blame, `traceback` its own.

    error_type: the exception's class name, or "died" / "timeout". `message`: the exception's text.
    """

    def __init__(self, text: str, *, rank: int, error_type: str, message: str, traceback: str) -> None:
        super().__init__(text)
        self.rank, self.error_type, self.message, self.traceback = rank, error_type, message, traceback


class RankPool:
    """One zygote and the calls to it. Thread safe; calls run one after another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._frames: Frames | None = None
        self._owner = os.getpid()

    def run(
        self,
        function: str,
        world_size: int,
        args: Sequence[Any],
        timeout: float,
        init: bool,
        preload: Sequence[str],
        environ: dict[str, str],
        backend: str,
        wait_all: bool,
    ) -> list[dict[str, Any]]:
        """One report per rank: {"ok", "value"} or {"ok": False, "error_type", "message", "traceback", "output"}."""
        from lockstep.distributed import codec

        with self._lock:
            self._start()
            assert self._frames is not None
            request = {
                "function": function,
                "world_size": world_size,
                "args": codec.encode(list(args)),
                "timeout": timeout,
                "init": init,
                "preload": list(preload),
                "environ": environ,
                "backend": backend,
                "wait_all": wait_all,
            }
            self._frames.send(request)
            reply = self._frames.receive(timeout + _SLACK_S)
            if reply is None:
                self.close()
                raise RuntimeError(f"the zygote did not answer {timeout + _SLACK_S:.0f} s after being asked for {function}; it was killed.")
            return list(reply["ranks"])

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None and self._owner == os.getpid():
            return
        ours, theirs = socket.socketpair()
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        command = [sys.executable, "-m", "lockstep.testing.zygote", str(theirs.fileno()), str(os.getpid())]
        # Its own session: Ctrl-C reaches the tests, and they close the zygote.
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environ, start_new_session=True)
        theirs.close()
        self._frames, self._owner = Frames(ours), os.getpid()

    @property
    def pid(self) -> int | None:
        """The zygote's process id, None when it does not run."""
        return self._process.pid if self._process is not None else None

    def close(self) -> None:
        """End the zygote and with it every rank. May be called twice."""
        if self._owner != os.getpid() or self._process is None:
            return
        if self._frames is not None:
            self._frames.close()  # it sees end-of-file, kills its ranks and leaves
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process, self._frames = None, None


pool = RankPool()
atexit.register(pool.close)


def run_ranks(
    function: str,
    world_size: int,
    *args: Any,
    timeout: float = 60,
    init: bool = True,
    preload: Sequence[str] = (),
    environ: dict[str, str] | None = None,
    backend: str = "gloo",
) -> list[Any]:
    """Call "package.module:function" as `function(rank, world_size, *args)` on every rank; the results by rank.

    init: init_distributed_environment with `backend` is done before the call and undone after. preload: modules that the zygote
    imports once, for functions that need heavy ones. environ: variables set in the ranks only.
    Raises RankError with the first failing rank's traceback; nothing is left running, whatever happens.
    """
    reports = pool.run(function, world_size, args, timeout, init, preload, environ or {}, backend, wait_all=False)
    failed = [(rank, report) for rank, report in enumerate(reports) if not report["ok"]]
    if failed:
        raise _error(function, world_size, failed)
    return [_value(report) for report in reports]


def run_ranks_outcomes(
    function: str, world_size: int, *args: Any, timeout: float = 60, init: bool = True, environ: dict[str, str] | None = None
) -> list[Any]:
    """As run_ranks, for tests of failures: every rank runs to its end, and a rank that failed gives its RankError."""
    reports = pool.run(function, world_size, args, timeout, init, (), environ or {}, "gloo", wait_all=True)
    return [_value(report) if report["ok"] else _error(function, world_size, [(rank, report)]) for rank, report in enumerate(reports)]


def _value(report: dict[str, Any]) -> Any:
    from lockstep.distributed import codec

    return codec.decode(report["value"])


def _error(function: str, world_size: int, failed: list[tuple[int, dict[str, Any]]]) -> RankError:
    # A rank that raised by itself explains more than those that then lost their peer or were killed.
    order = {"killed": 3, "timeout": 2, "died": 0}
    failed = sorted(failed, key=lambda item: (order.get(item[1]["error_type"], 1), item[1].get("when", 0.0)))
    rank, report = failed[0]
    lines = [f"{function} failed on rank {rank} of {world_size}: {report['error_type']}: {report['message']}", report["traceback"]]
    for other, also in failed[1:]:
        lines.append(f"rank {other}: {also['error_type']}: {also['message']}")
        if also["error_type"] == "timeout":
            lines.append(also["traceback"])
    if report["output"].strip():
        lines.append(f"--- output of rank {rank}:\n{report['output'].strip()}")
    return RankError(
        "\n".join(line for line in lines if line),
        rank=rank,
        error_type=report["error_type"],
        message=report["message"],
        traceback=report["traceback"],
    )


__all__ = ["RankError", "RankPool", "pool", "run_ranks", "run_ranks_outcomes"]
