"""How long this rank waits for others, added up in its progress cell for as long as it lives.

Wall times of ranks in lockstep are alike, whoever is slow: who waits least in their meetings is who the others wait for. Where
ranks meet in shared memory, the kernels count the wait itself; elsewhere the whole of a collective counts as one. A collective
costs some 0.3 us more. On a GPU only the CPU's part of a collective is seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lockstep.distributed.communicators.base import Communicator
from lockstep.distributed.groups import ParallelGroups
from lockstep.distributed.progress import ProgressCell

COLLECTIVES = sorted((Communicator.__abstractmethods__ | {"combine", "largest", "send", "recv_"}) & set(vars(Communicator)))

now_ns = time.monotonic_ns


class Meter:
    """One rank's. `close` before its groups are given to anybody else."""

    def __init__(self, groups: ParallelGroups, cell: ProgressCell) -> None:
        self._cell, self._times = cell, cell.times
        self._inside = False
        self._timed_ns = 0  # in collectives whose waits nobody counts
        self._seen_ns = 0  # waits told so far
        self._clocks: list[Callable[[], float]] = []  # that count waits, seconds
        self._shadowed: list[tuple[Communicator, str]] = []
        self._layers = 0
        tp = groups.tp
        if hasattr(tp.communicator, "waited_s"):
            self._layers = cell.number_of(f"{tp.unique_name}.layers")
        for group in dict.fromkeys((tp, groups.dp, groups.pcp, groups.dcp, groups.ep, groups.pp)):
            if group is not None and group.world_size > 1:
                for communicator in dict.fromkeys((group.communicator, group.cpu_communicator)):
                    self._watch(communicator, group.unique_name, stage=group is groups.pp)
        self._seen_ns = self.waited_ns()

    def _watch(self, communicator: Communicator, name: str, stage: bool) -> None:
        clock = getattr(communicator, "waited_s", None)
        if clock is not None and not stage:
            self._clocks.append(clock)
        for method in COLLECTIVES:
            self._shadow(communicator, method, f"{name}.{method.rstrip('_')}", counts=clock is None and not stage)

    def _shadow(self, owner: Communicator, method: str, name: str, counts: bool) -> None:
        """Put a method that times itself before the class's. Calls inside calls are part of these. counts: all of it is a wait."""
        if method in vars(owner):
            return  # two groups of the same ranks have it in common
        plain: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return plain(*args, **kwargs)
            self._inside = True
            began = now_ns()
            try:
                return plain(*args, **kwargs)
            finally:
                took = now_ns() - began
                self._inside = False
                self._times.collective(self._cell.number_of(name), took)
                if counts:
                    self._timed_ns += took

        setattr(owner, method, timed)
        self._shadowed.append((owner, method))

    def waited_ns(self) -> int:
        """How long this rank has waited for the others, in all."""
        return self._timed_ns + int(1e9 * sum(clock() for clock in self._clocks))

    def layers(self, before_ns: int) -> None:
        """The kernels ran layers, and met the others inside them: those waits have no call of their own. before_ns: the waits before."""
        self._times.collective(self._layers, self.waited_ns() - before_ns)

    @contextmanager
    def stage(self, *, whole: bool = False) -> Iterator[None]:
        """Wait for another pipeline stage. What ranks of this one wait for each other meanwhile is not the stage's; whole: it is,
        where one of them hears of the other stage and tells the rest."""
        began, before = now_ns(), self.waited_ns()
        yield
        others = self.waited_ns() - before
        if whole:
            self._seen_ns += others  # told here, and not as a wait for each other
            others = 0
        self._times.waited_for_stage(max(0, now_ns() - began - others))

    def stepped(self) -> None:
        """A step has ended: tell what it waited."""
        waited = self.waited_ns()
        self._times.waited(waited - self._seen_ns)
        self._seen_ns = waited

    def close(self) -> None:
        """Leave the communicators as they were."""
        for owner, method in self._shadowed:
            delattr(owner, method)
        self._shadowed.clear()
        self._clocks.clear()
