"""Which cores each rank computes on, and with how many threads: one plan for all ranks of this host."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest

from lockstep.config.tree import ParallelConfig
from lockstep.utils import cores as machine
from lockstep.utils.cores import PhysicalCore, RankCores


def plan_cores(
    cores: Sequence[PhysicalCore], n_ranks: int, threads_per_rank: int | None = None, bind: bool = True, quota: float | None = None
) -> list[RankCores]:
    """Share `cores` (neighbours next to each other, as `usable_cores` gives them) out among ranks, by rank.

    1. Each rank gets a run of consecutive physical cores, as even as can be, the first ranks one more; and computes on
       one thread per physical core. (A second thread on a core's sibling shares its arithmetic units and gains nothing.)
    2. With fewer physical cores than ranks, the runs are of logical CPUs, one thread each. With fewer of those too, everyone
       has one thread, and ranks share CPUs, as many on each; where that does not come out even, nobody is bound: the
       system shares better than an uneven plan.
    3. `threads_per_rank` overrides the number of threads. They go to different physical cores first, then to siblings;
       a rank asked for more threads than its run has CPUs is not bound.
    4. `quota` (CPUs' worth of time) below the cores: as many threads as it pays for, and nobody is bound: the
       containers of a host would all take the same first cores.
    """
    if n_ranks < 1:
        raise ValueError(f"n_ranks={n_ranks} must be at least 1.")
    cpus = sum(map(len, cores))
    limited = quota is not None and quota < len(cores)
    parts: Sequence[PhysicalCore] = cores if n_ranks <= len(cores) else [(cpu,) for cpu in chain(*cores)]
    if parts and n_ranks % len(parts) == 0:  # in turn, so that the ranks of one stage or replica are not all on one CPU
        parts = list(parts) * (n_ranks // len(parts))
    base, more = divmod(max(int(quota or 0), 1) if limited else len(parts), n_ranks)
    sizes = [base + (rank < more) for rank in range(n_ranks)]
    # Where a run is of siblings (step 2) one thread is all it is good for.
    threads = [threads_per_rank or (max(size, 1) if n_ranks <= len(cores) else 1) for size in sizes]
    crowded = sum(threads) > (min(cpus, quota) if quota is not None else cpus)
    plan, start = [], 0
    for count, size in zip(threads, sizes, strict=True):
        run = parts[start : start + size]
        start += size
        lanes = [cpu for turn in zip_longest(*run) for cpu in turn if cpu is not None]  # first of each core, then the siblings
        why = "" if bind else "cpu_binding is off"
        if limited:
            why = why or f"the container may use {quota:g} CPUs of {cpus}, not which"
        elif not base:
            why = why or f"{n_ranks} ranks on {cpus} CPUs"
        elif count > len(lanes):
            why = why or f"{count} threads on {len(lanes)} CPU{'s' if len(lanes) > 1 else ''}"
        if why:
            plan.append(RankCores((), count, (), crowded, why))
            continue
        alone = count == 1 and len(run) > 1  # it may use any: another engine's single thread would be on the same first one
        plan.append(RankCores(tuple(sorted(lanes)), count, () if alone else tuple(lanes[:count]), crowded))
    return plan


def plan_here(n_ranks: int, parallel: ParallelConfig) -> list[RankCores]:
    """The plan for `n_ranks` on this host, for what this process may use; of several replicas here, this one's part of it."""
    replicas, mine = parallel.local_replicas, parallel.local_replica
    if mine is None:
        replicas, mine = 1, 0
    whole = plan_cores(machine.usable_cores(), n_ranks * replicas, parallel.threads_per_rank, parallel.cpu_binding, machine.quota())
    return whole[mine * n_ranks : (mine + 1) * n_ranks]


def thread_environment(threads: int) -> dict[str, str]:
    """The variables that size the maths libraries' thread pools; they are read once, when those are loaded."""
    return {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")}
