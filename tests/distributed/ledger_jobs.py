"""Functions that the ledger tests run on ranks."""

from __future__ import annotations

import time
from typing import Any

import torch

from lockstep.distributed import ledger, observer
from lockstep.distributed import parallel_state as ps


def _setup(world_size: int, force_store: bool, timeout_s: float = 20.0, **sizes: int) -> Any:
    ps.initialize_model_parallel(**(sizes or {"tensor_model_parallel_size": world_size}))
    ledger.enable(timeout_s, force_store=force_store)
    ps.get_world_group().barrier()
    return ps.get_tp_group()


def _outcome(run: Any) -> tuple[str, str, float]:
    started = time.monotonic()
    try:
        run()
    except ledger.CollectiveMismatchError as error:
        return type(error).__name__, str(error), time.monotonic() - started
    finally:
        ledger.disable()
    return "none", "", time.monotonic() - started


def agree(rank: int, world_size: int, force_store: bool, n: int) -> Any:
    tp = _setup(world_size, force_store)
    seen: list[tuple[int, str]] = []

    def hear(number: int, what: str) -> None:
        seen.append((number, what))

    observer.add(hear)
    start = time.monotonic()
    x = torch.ones(4)
    for _ in range(n):
        x = tp.all_reduce(x) / world_size
        tp.all_gather(x, 0)
        tp.barrier()
        tp.broadcast_object([1], 0)
    took = time.monotonic() - start
    observer.remove(hear)
    ledger.disable()
    return bool((x == 1).all()), took, len(seen), seen[0][1]


def different_op(rank: int, world_size: int, force_store: bool) -> Any:
    tp = _setup(world_size, force_store)
    x = torch.ones(2, 3)
    return _outcome(lambda: tp.all_gather(x, 0) if rank == 1 else tp.all_reduce(x))


def different_shape(rank: int, world_size: int, force_store: bool) -> Any:
    tp = _setup(world_size, force_store)
    return _outcome(lambda: tp.all_reduce(torch.ones(2 + rank, 3)))


def different_dtype(rank: int, world_size: int, force_store: bool) -> Any:
    tp = _setup(world_size, force_store)
    return _outcome(lambda: tp.all_reduce(torch.ones(2, dtype=torch.float32 if rank else torch.bfloat16)))


def different_group(rank: int, world_size: int, force_store: bool) -> Any:
    """Rank 0 reduces over TP, rank 1 over the world: each waits for the other in another group."""
    tp = _setup(world_size, force_store)
    x = torch.ones(2)
    return _outcome(lambda: ps.get_world_group().all_reduce(x) if rank == 1 else tp.all_reduce(x))


def skip(rank: int, world_size: int, force_store: bool, timeout_s: float) -> Any:
    """Rank 1 skips a collective and is busy elsewhere."""
    tp = _setup(world_size, force_store, timeout_s)
    tp.all_gather(torch.ones(3), 0)

    def run() -> None:
        if rank == 1:
            time.sleep(timeout_s + 2.0)
        tp.all_reduce(torch.ones(5))

    return _outcome(run)


def leave_early(rank: int, world_size: int, force_store: bool) -> Any:
    tp = _setup(world_size, force_store)

    def run() -> None:
        if rank != 1:
            tp.all_reduce(torch.ones(5))

    return _outcome(run)


def bystanders(rank: int, world_size: int, force_store: bool) -> Any:
    """TP 2 x PP 2: ranks 0 and 1 disagree; 2 waits to receive from 0, 3 meets it at its next collective."""
    tp = _setup(world_size, force_store, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    x = torch.ones(2, 3)

    def run() -> None:
        if rank == 2:
            ps.get_pp_group().recv((2, 3), torch.float32)
        elif rank == 3:
            time.sleep(0.5)
            ps.get_pp_group().all_reduce(x)
        elif rank == 1:
            tp.all_gather(x, 0)
        else:
            tp.all_reduce(x)

    return _outcome(run)


def die(rank: int, world_size: int) -> Any:
    import os
    import signal

    tp = _setup(world_size, False)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return _outcome(lambda: tp.all_reduce(torch.ones(1)))
