"""This process's compute threads: how many, and on which cores. The kernels' team and torch's own pool follow one plan."""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Collection

from lockstep.kernels.library import library
from lockstep.utils.cores import RankCores, keep_on

SPIN_NS = 50_000  # how long a wait spins, where each thread has a CPU: a few times what threads differ by
_GRAIN = 1 << 15  # elements below which torch gives a thread no work


def take(share: RankCores, own_process: bool) -> None:
    """Compute on `share` from here on: size torch's pool and the kernels' team, each of its threads on its lane.

    own_process: the caller (the team's thread 0) stays on its lane for good; otherwise see `Seat`. Call it after
    everything whose threads should run beside the computing ones has started: threads inherit the caller's lane.
    """
    import torch

    kernels = library()
    # Beside the kernels torch only moves a few rows. A pool of its own would go on spinning on the team's cores for
    # milliseconds after each of its operations (measured: a quarter of a step of 8 rows).
    torch.set_num_threads(share.threads if kernels is None else 1)
    if kernels is None:
        return
    lanes = array("i", share.lanes)
    kernels.team_set(share.threads, lanes.buffer_info()[0], len(lanes))
    kernels.set_spin_ns(0 if share.crowded else SPIN_NS)
    if own_process and share.lanes:
        _start_pool()
        keep_on(share.lanes[:1])


class Seat:
    """`with seat:` keeps the caller on its lane while it computes, in a process that is not ours to bind.

    A caller left to the system often wakes its team's threads on its own core, where both lose their time slices;
    moving it costs two short system calls a step. Afterwards it has its own cores back.
    """

    def __init__(self, share: RankCores) -> None:
        self._lane = share.lanes[:1] if library() is not None else ()
        self._before: Collection[int] = ()
        self._pool: tuple[int, int] | None = None  # (caller, size) of the pool of torch that is known to run

    def __enter__(self) -> None:
        if not self._lane:
            return
        import torch

        pool = threading.get_ident(), torch.get_num_threads()
        if pool != self._pool:  # torch keeps a pool for each caller: were it started inside, it would share the lane for good
            self._pool = pool
            _start_pool()
        self._before = os.sched_getaffinity(0)
        keep_on(self._lane)

    def __exit__(self, *_: object) -> None:
        if self._lane:
            keep_on(self._before)


def _start_pool() -> None:
    """Make torch start the caller's pool of threads, on the cores that the caller has now."""
    import torch

    torch.zeros(torch.get_num_threads() * _GRAIN).add_(1)
