"""torch's default process group: made by us, or found and checked."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lockstep.distributed import process_groups
from lockstep.utils import env

BACKENDS = ("gloo", "nccl")


def seconds(timeout: timedelta | float | None) -> float | None:
    """A timeout in seconds. Raises ValueError when it is not positive."""
    limit = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if limit is not None and limit <= 0:
        raise ValueError(f"timeout is {limit} s: it must be more than 0.")
    return limit


def choose_backend(backend: str | None) -> str:
    """`backend`, or what the machine has: nccl with CUDA devices, else gloo. Raises ValueError for one it has not."""
    if backend is None:
        return "nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: choose one of {', '.join(BACKENDS)}.")
    if backend == "nccl" and not (dist.is_nccl_available() and torch.cuda.is_available()):
        raise ValueError('backend "nccl" needs a CUDA device and a torch built with NCCL; this machine has not both: use "gloo".')
    return backend


def place(rank: int, world_size: int, local_rank: int, init_method: str) -> tuple[int, int, int]:
    """Fill -1s from torchrun's environment and check: (rank, world_size, local_rank). Raises ValueError."""
    found = env.torchrun_rank() if init_method.startswith("env://") else None
    if found is not None:
        rank = found[0] if rank == -1 else rank
        world_size = found[2] if world_size == -1 else world_size
        local_rank = found[1] if local_rank == -1 else local_rank
    if rank == -1 or world_size == -1:
        raise ValueError(f"rank ({rank}) and world size ({world_size}) are needed: pass them, or start with torchrun and env://.")
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside 0..{world_size - 1}.")
    return rank, world_size, rank if local_rank == -1 else local_rank


def local_rank(given: int, rank: int) -> int:
    """`given`, else torchrun's, else `rank`."""
    if given != -1:
        return given
    found = env.torchrun_rank()
    return found[1] if found is not None else rank


def create(store: Any, rank: int, world_size: int, backend: str, device: torch.device, timeout_s: float) -> None:
    """Make the default group over `store`. NCCL's is bound to its device, so that subgroups can be split off it."""
    settings: dict[str, Any] = {"backend": "gloo"}
    if backend == "nccl":
        settings = {"backend": "nccl", "device_id": device}
    try:
        with process_groups.one_event_loop():
            dist.init_process_group(store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s), **settings)
    except BaseException:
        process_groups.forget_devices()
        raise


def validate(rank: int, world_size: int, backend: str) -> tuple[int, int]:
    """Whether the default group that somebody else made can serve: its (rank, world size).

    Raises ValueError, with the init_process_group call that would do, when it cannot.
    """
    wanted = (
        'init_process_group("gloo")'
        if backend == "gloo"
        else 'init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", local_rank))'
    )
    has_rank, has_size = dist.get_rank(), dist.get_world_size()
    if world_size not in (-1, has_size):
        raise ValueError(
            f"torch.distributed is already initialised with {has_size} ranks, but world size {world_size} is asked for: "
            f"start {world_size} processes, each calling {wanted[:-1]}, world_size={world_size}, rank=...)."
        )
    if rank not in (-1, has_rank):
        raise ValueError(
            f"torch.distributed is already initialised as rank {has_rank}, but rank {rank} is asked for: "
            f"call {wanted[:-1]}, world_size={has_size}, rank={rank}), or pass rank=-1."
        )
    found = process_groups.backends()
    text = ",".join(f"{device}:{name}" for device, name in found.items())
    foreign = sorted(set(found.values()) - set(BACKENDS))
    if foreign:
        raise ValueError(f"torch.distributed is already initialised with backend {text}, which lockstep cannot use: call {wanted} instead.")
    return has_rank, has_size
