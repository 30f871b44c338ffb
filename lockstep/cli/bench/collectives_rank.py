"""One rank of `lockstep bench collectives`: `python -m lockstep.cli.bench.collectives_rank SPEC`, SPEC being JSON.

Rank 0 prints a JSON line for each result.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lockstep.config.tree import ParallelConfig
from lockstep.distributed import parallel_state, rendezvous
from lockstep.distributed.communicators.base import Communicator
from lockstep.distributed.communicators.gloo import GlooCommunicator
from lockstep.distributed.communicators.select import host_communicator
from lockstep.distributed.group import GroupCoordinator
from lockstep.executor.affinity import plan_here
from lockstep.utils import procs
from lockstep.utils.cores import keep_on

ROUNDS, LEAST_CALLS, MOST_CALLS = 3, 2, 2000
TIMEOUT_S = 120.0


def calls(op: str, group: GroupCoordinator, size: int, dtype: torch.dtype) -> tuple[Callable[[], Any], float]:
    """-> (the public call, its bus bandwidth's factor: the share of `size` bytes that must cross between ranks, as nccl-tests
    defines it). Tensors are made here."""
    n, rank = group.world_size, group.rank_in_group
    count = max(1, size // torch.empty(0, dtype=dtype).element_size())
    whole, share = torch.zeros(-(-count // n) * n, dtype=dtype), torch.zeros(-(-count // n), dtype=dtype)
    x, factor = torch.zeros(count, dtype=dtype), (n - 1) / n

    def send_recv() -> None:
        handle = group.isend(x, (rank + 1) % n)
        group.irecv(got, (rank - 1) % n).wait()
        handle.wait()

    got = torch.empty_like(x)
    return {
        "all_reduce": (lambda: group.all_reduce_(x), 2 * factor),
        "all_gather": (lambda: group.all_gather(share, 0), factor),
        "reduce_scatter": (lambda: group.reduce_scatter(whole, 0), factor),
        "gather": (lambda: group.gather(share, 0, 0), factor),
        "broadcast": (lambda: group.broadcast(x, 0), 1.0),
        "all_to_all": (lambda: group.all_to_all(whole), factor),
        "send_recv": (send_recv, 1.0),
        "barrier": (group.barrier, 0.0),
    }[op]


class Bench:
    """The communicators of one group, timed in turns."""

    def __init__(self, spec: dict[str, Any], group: GroupCoordinator) -> None:
        self.spec, self.group, self.rank = spec, group, group.rank_in_group
        self.gloo = GlooCommunicator(group.cpu_group, torch.device("cpu"))
        self.communicators = {name: found for name in spec["communicators"] if (found := self._make(name)) is not None}

    def _make(self, name: str) -> Communicator | None:
        if name == "gloo":
            return self.gloo
        try:
            return host_communicator(self.group.cpu_group, TIMEOUT_S, name)
        except ValueError as error:
            if self.rank == 0:
                print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
            return None

    def say(self, line: dict[str, Any]) -> None:
        if self.rank == 0:
            print(json.dumps(line), flush=True)

    def run(self) -> None:
        """Every op, dtype and size, in about the seconds given."""
        ops, sizes, dtypes = self.spec["ops"], self.spec["sizes"], self.spec["dtypes"]
        cells = sum((1 if op == "barrier" else len(sizes) * len(dtypes)) * (len(self.communicators) + (op == "all_reduce")) for op in ops)
        self.cell_s = self.spec["budget_s"] / max(1, cells)
        self.copies = {size: self._memcpy(size) for size in sizes}
        for op in ops:
            for dtype in dtypes if op != "barrier" else dtypes[:1]:
                for size in sizes if op != "barrier" else [0]:
                    self._cell(op, size, dtype)

    def _memcpy(self, size: int) -> float:
        x, y = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
        return median(self._times(lambda: y.copy_(x), self._count(lambda: y.copy_(x), 0.05)))

    def _cell(self, op: str, size: int, dtype: str) -> None:
        contestants = {
            (name, bare): c for name, c in self.communicators.items() for bare in ((False, True) if op == "all_reduce" else (False,))
        }
        todo: dict[tuple[str, bool], tuple[Callable[[], Any], int]] = {}
        factor = 0.0
        for (name, bare), communicator in contestants.items():
            self.group.communicator = self.group.cpu_communicator = communicator
            call, factor = calls(op, self.group, size, getattr(torch, dtype))
            if bare:
                x = torch.zeros(max(1, size // getattr(torch, dtype).itemsize), dtype=getattr(torch, dtype))
                call = _bare(communicator, x)
            todo[name, bare] = call, self._count(call, self.cell_s / ROUNDS)
        times: dict[tuple[str, bool], list[float]] = {key: [] for key in todo}
        for _ in range(ROUNDS):
            for (name, bare), (call, count) in todo.items():
                self.group.communicator = self.group.cpu_communicator = self.communicators[name]
                times[name, bare] += self._times(call, count)
        for name in self.communicators:
            self.say(self._line(op, size, dtype, name, times, factor))

    def _line(self, op: str, size: int, dtype: str, name: str, times: dict[tuple[str, bool], list[float]], factor: float) -> dict[str, Any]:
        found = sorted(times[name, False])
        middle = median(found)
        line = {"op": op, "bytes": size, "dtype": dtype, "communicator": name, "world_size": self.group.world_size}
        line |= {"median_us": round(middle * 1e6, 3), "p99_us": round(found[int(0.99 * (len(found) - 1) + 0.5)] * 1e6, 3)}
        line |= {"busbw_GBps": round(size * factor / middle / 1e9, 4), "calls": len(found)}
        line["memcpy_us"] = round(self.copies[size] * 1e6, 3) if size else None
        if (name, True) in times:
            bare = median(times[name, True])
            line |= {"bare_us": round(bare * 1e6, 3), "overhead_us": round((middle - bare) * 1e6, 3)}
        return line

    def _count(self, call: Callable[[], Any], seconds: float) -> int:
        """How many calls fill `seconds`, the same on all ranks."""
        call()
        start = time.perf_counter()
        call()
        took = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        slowest = float(self.gloo.all_gather(took, 0).max())
        return int(min(MOST_CALLS, max(LEAST_CALLS, seconds / max(slowest, 1e-7))))

    def _times(self, call: Callable[[], Any], count: int) -> list[float]:
        """Seconds of each call, of the rank that took longest for it."""
        clock = time.perf_counter
        self.gloo.barrier()
        call()
        stamps = [clock()]
        for _ in range(count):
            call()
            stamps.append(clock())
        mine = torch.tensor(stamps, dtype=torch.float64).diff()
        slowest: list[float] = self.gloo.all_gather(mine[None], 0).amax(0).tolist()
        return slowest


def _bare(communicator: Communicator, x: Tensor) -> Callable[[], None]:
    return lambda: communicator.all_reduce_(x)


def main() -> None:
    spec = json.loads(sys.argv[1])
    procs.die_with_parent(spec["parent"], spec["death_fd"])
    rank, world = spec["rank"], spec["world_size"]
    torch.set_num_threads(1)
    listen = spec["fd"] if rank == 0 else None
    rendezvous.join(rank, world, rank, "127.0.0.1", spec["port"], listen, "gloo", timedelta(seconds=TIMEOUT_S).total_seconds())
    parallel_state.initialize_model_parallel(world)
    keep_on(plan_here(world, ParallelConfig(tensor_parallel_size=world, threads_per_rank=1))[rank].lanes[:1])
    bench = Bench(spec, parallel_state.get_tp_group())
    bench.run()
    bench.gloo.barrier()
    sys.stdout.flush()
    os._exit(0)  # as workers leave: the library's own tear-down can abort a process that has done its work


if __name__ == "__main__":
    main()
