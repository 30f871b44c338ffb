"""Processes: whether they live and in which state, and dying with the parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable

_PR_SET_PDEATHSIG = 1


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; None when there is no such process (or no /proc)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None


def state(pid: int) -> str:
    """One letter of the kernel's: R runs, S sleeps, D waits for a device, T stopped, t traced, Z dead; "" unknown."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def birth(pid: int) -> int:
    """When the process started, in clock ticks since boot: with the pid it names one process for good. 0: unknown."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def alive(pid: int, born: int = 0) -> bool:
    """Whether the process runs (a zombie does not). With `born`, whether it is still the one born then."""
    fields = _stat(pid)
    if fields is not None:
        return fields[0] not in "ZX" and (not born or int(fields[19]) == born)
    if os.path.isdir("/proc/self"):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def exit_cause(code: int | None) -> str:
    """An exit code in words: "killed by SIGKILL", "exit code 1", ..."""
    if code is None:
        return "still running"
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}"


def oom_kills() -> int:
    """How many processes of this process's cgroup the out-of-memory killer has ended; 0 where nobody counts."""
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/cgroup", encoding="ascii") as file:
            path = next((line[3:].strip() for line in file if line.startswith("0::")), "")
        with open(f"/sys/fs/cgroup{path}/memory.events", encoding="ascii") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
    return 0


def die_with_parent(parent_pid: int, death_fd: int, on_death: Callable[[], None] | None = None, *, follow_thread: bool = True) -> None:
    """End this process group when the parent does, however it ends.

    Two means, because each has a gap: the kernel's parent-death signal works even on a stopped process, but follows the
    *thread* that forked; end-of-file on a pipe whose other end only the parent holds follows the process.
    follow_thread: False where the thread that forked may end before the process does: the pipe alone has to do.
    """
    if sys.platform == "linux" and follow_thread:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # it died before the request was in place
            os._exit(1)

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(death_fd, 1):
                pass
        if on_death is not None:
            with contextlib.suppress(Exception):
                on_death()
        if os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="death-pipe", daemon=True).start()


def kill_group(pid: int, signum: int = signal.SIGKILL) -> None:
    """Signal the process group that `pid` leads (also when only children of it are left). Gone already is fine."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signum)


def wait_gone(pids: Iterable[int], timeout_s: float) -> list[int]:
    """Wait until none of `pids` is alive; the ones that still are after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    left = list(pids)
    while True:
        left = [pid for pid in left if alive(pid)]
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(0.005)
