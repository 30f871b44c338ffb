"""What a figure was measured on: the machine, the commit, and the memory bandwidth it had at that moment."""

from __future__ import annotations

import platform
import subprocess
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from lockstep.version import __version__


def describe() -> dict[str, Any]:
    """Processor, cores, memory, versions and commit, for the `machine` field of a result."""
    from importlib.metadata import version

    return {
        "cpu": _cpu_name(),
        "cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "torch": version("torch"),
        "lockstep": __version__,
        "commit": commit(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, with `+` when the tree has changes; "release" outside a checkout."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", str(here), *args], check=False, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        head = git("rev-parse", "--short=10", "HEAD")
        return head + ("+" if head and git("status", "--porcelain", "--untracked-files=no") else "") if head else "release"
    except (OSError, subprocess.TimeoutExpired):
        return "release"


def read_bandwidth_gbps(threads: int, mib: int = 256, repeats: int = 5) -> float:
    """Memory read bandwidth now, in GB/s: `threads` threads each take the dot product of their own array with itself.

    The array is far larger than the caches and read once per pass (BLAS lets the interpreter lock go), so the time is
    that of memory. Median of `repeats` passes.
    """
    import numpy as np

    arrays = [np.ones(mib * 2**18, dtype=np.float32) for _ in range(threads)]
    times = []
    for _ in range(repeats + 1):
        workers = [threading.Thread(target=np.dot, args=(a, a)) for a in arrays]
        start = time.perf_counter()
        for w in workers:
            w.start()
        for w in workers:
            w.join()
        times.append(time.perf_counter() - start)
    return round(sum(a.nbytes for a in arrays) / median(times[1:]) / 1e9, 2)


class Noise:
    """CPU use by others on this machine, in cores, since construction: what makes a repetition dirty."""

    def __init__(self) -> None:
        self.start, self.busy, self.own = time.monotonic(), _busy_s(), _own_s()

    def other_cores(self) -> float:
        """Average cores used by processes that are not this one or its descendants."""
        elapsed = max(time.monotonic() - self.start, 1e-6)
        return round(max(0.0, (_busy_s() - self.busy) - (_own_s() - self.own)) / elapsed, 3)


def _busy_s() -> float:
    t = psutil.cpu_times()
    return sum(t) - t.idle - getattr(t, "iowait", 0.0) - getattr(t, "guest", 0.0) - getattr(t, "guest_nice", 0.0)


def tree() -> list[psutil.Process]:
    """This process and every descendant that still lives."""
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def _own_s() -> float:
    total = 0.0
    for p in tree():
        try:
            t = p.cpu_times()
            total += t.user + t.system + t.children_user + t.children_system
        except psutil.Error:
            continue
    return total


def peak_rss_mib() -> int:
    """Sum of the peak resident memory of the process tree, in MiB (pages that processes share count in each)."""
    total = 0
    for p in tree():
        try:
            for line in Path(f"/proc/{p.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    total += int(line.split()[1])
        except OSError:
            continue
    return total // 1024
