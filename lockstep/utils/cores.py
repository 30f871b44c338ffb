"""The CPU cores this process may use, as the system tells them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from lockstep.utils import cgroups

# The logical CPUs of one physical core that this process may use, ascending. They share its arithmetic units.
PhysicalCore = tuple[int, ...]

_CPUS = Path("/sys/devices/system/cpu")


class RankCores(NamedTuple):
    """Where one rank computes.

    cores: logical CPUs that its process is kept on, empty for "not bound". threads: compute threads, at least 1.
    lanes: the CPU of each thread, as many as threads; empty when not bound, or when one thread has several cores.
    crowded: the ranks here have more threads than there are CPUs, so a thread that waits must not spin. why: why it is
    not bound, "" when it is.
    """

    cores: tuple[int, ...]
    threads: int
    lanes: tuple[int, ...] = ()
    crowded: bool = False
    why: str = ""


def usable_cores() -> list[PhysicalCore]:
    """The physical cores this process may run on, near ones next to each other.

    Where the system does not tell which CPUs are siblings, each is a core of its own.
    """
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    found: dict[tuple[int, ...], list[int]] = {}
    for cpu in sorted(cpus):
        found.setdefault(_place(cpu), []).append(cpu)
    return [tuple(found[place]) for place in sorted(found)]


def usable_cpus() -> int:
    """How many logical CPUs this process may run on."""
    return sum(map(len, usable_cores()))


def quota() -> float | None:
    """CPUs' worth of time that this process's container may use, None for no such limit."""
    limits = []
    for folder, second in cgroups.folders("cpu"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            if second:
                share, period = (folder / "cpu.max").read_text().split()
            else:
                share, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(share) > 0 and int(period) > 0:
                limits.append(int(share) / int(period))
    return min(limits, default=None)


def keep_on(cpus: Collection[int]) -> None:
    """Keep this thread, and those it will start, on `cpus`; nothing when empty or not allowed."""
    if cpus and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # a container's limits changed meanwhile: unbound is slower, not wrong
            os.sched_setaffinity(0, cpus)


def _place(cpu: int) -> tuple[int, ...]:
    """Package, NUMA node, and the first CPU of the physical core: equal for siblings, close for neighbours."""
    folder = _CPUS / f"cpu{cpu}"
    node = min((int(p.name[4:]) for p in folder.glob("node[0-9]*")), default=0)
    try:
        package = int((folder / "topology/physical_package_id").read_text())
        siblings = (folder / "topology/thread_siblings_list").read_text()
        return package, node, int(siblings.replace("-", ",").split(",")[0])
    except (OSError, ValueError):
        return 0, node, cpu
