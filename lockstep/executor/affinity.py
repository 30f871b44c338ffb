"""Which cores each rank computes on. The plan is pure; the two functions that look at the machine are below it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple


class RankCores(NamedTuple):
    """cores: to bind to, empty for "do not bind". threads: compute threads, at least 1."""

    cores: tuple[int, ...]
    threads: int


def plan_cores(cores: Sequence[int], n_ranks: int, threads_per_rank: int | None = None, bind: bool = True) -> list[RankCores]:
    """Share `cores` (in the order of `topology_order`: neighbours share caches) out among ranks, by rank.

    Runs of consecutive cores, as even as can be, the first ranks getting one more. With fewer cores than ranks nobody
    is bound and everyone computes on one thread: the kernel shares better than a fixed plan could.
    `threads_per_rank` overrides the number of threads; a rank asked for more threads than its share is not bound.
    """
    if n_ranks < 1:
        raise ValueError(f"n_ranks={n_ranks} must be at least 1.")
    if len(cores) < n_ranks:
        return [RankCores((), threads_per_rank or 1)] * n_ranks
    base, more = divmod(len(cores), n_ranks)
    plan, start = [], 0
    for rank in range(n_ranks):
        stop = start + base + (rank < more)
        threads = threads_per_rank or stop - start
        fits = threads <= stop - start
        plan.append(RankCores(tuple(cores[start:stop]) if bind and fits else (), threads))
        start = stop
    return plan


def topology_order(cores: Sequence[int]) -> list[int]:
    """`cores` by package, then physical core, so that consecutive ones are near each other."""
    return sorted(cores, key=lambda core: (_sysfs(core, "physical_package_id"), _sysfs(core, "core_id"), core))


def usable_cores() -> list[int]:
    """The cores this process may run on, near ones next to each other. Empty where the system does not tell."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    return topology_order(sorted(os.sched_getaffinity(0)))


def bind(cores: Sequence[int]) -> None:
    """Keep this process and the threads it will start on `cores`; nothing when empty or not allowed."""
    if cores and hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, cores)
        except OSError:  # a container's limits changed meanwhile: unbound is slower, not wrong
            return


def thread_environment(threads: int) -> dict[str, str]:
    """The variables that size the maths libraries' thread pools; they are read once, when those are loaded."""
    return {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")}


def _sysfs(core: int, name: str) -> int:
    try:
        with open(f"/sys/devices/system/cpu/cpu{core}/topology/{name}", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0
