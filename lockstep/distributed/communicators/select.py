"""Which communicator a group gets, and why. Every rank of the group comes to the same answer, because all facts are exchanged."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.distributed as dist

from lockstep.distributed.communicators.base import Communicator
from lockstep.distributed.communicators.gloo import GlooCommunicator
from lockstep.distributed.communicators.segment import MAX_WORLD, Seat, SegmentError, exchange, host_identity, open_groups
from lockstep.distributed.communicators.shm import ShmCommunicator
from lockstep.observability.logging import get_logger
from lockstep.utils import env

_log = get_logger(__name__)
CHOICES = ("auto", "gloo", "shm", "hierarchical")


def host_communicator(group: Any, timeout_s: float) -> Communicator:
    """The communicator for host memory over the gloo torch group `group`. Collective over it.

    Its attribute `explanation` says why it is the one. Raises ValueError for an unknown `LOCKSTEP_COMMUNICATOR`, and when
    the one that it names cannot be had.
    """
    chosen = env.communicator()
    if chosen not in CHOICES:
        raise ValueError(f"LOCKSTEP_COMMUNICATOR={chosen} is not known: use one of {', '.join(CHOICES)}.")
    gloo = GlooCommunicator(group, torch.device("cpu"))
    if chosen == "gloo" or gloo.world_size == 1:
        return _explained(gloo, "LOCKSTEP_COMMUNICATOR says so" if chosen == "gloo" else "a group of one")
    from lockstep.kernels.library import library

    lib = library()
    seats = exchange(gloo, Seat(host_identity(), _cores(), "" if lib is not None else "it has no kernel library"), Seat)
    why_not = _refusal(seats)
    if not why_not:
        spins, spin_text = _may_spin(seats, gloo.rank)
        try:
            handle = open_groups(lib, gloo, [seat.host for seat in seats], _name(group), timeout_s, spins)
            return _explained(ShmCommunicator(lib, handle, gloo), f"{gloo.world_size} ranks on one host; {spin_text}")
        except SegmentError as e:
            why_not = str(e)
    if chosen != "auto":
        raise ValueError(f"LOCKSTEP_COMMUNICATOR={chosen}, but group {_name(group)} cannot have it: {why_not}.")
    return _explained(gloo, f"no shared memory: {why_not}")


def _refusal(seats: list[Seat]) -> str:
    for rank, seat in enumerate(seats):
        if seat.missing:
            return f"rank {rank}: {seat.missing}"
    if len(seats) > MAX_WORLD:
        return f"{len(seats)} ranks are more than {MAX_WORLD}"
    if len({seat.host for seat in seats}) > 1:
        return "the ranks are on several hosts"
    return ""


def _may_spin(seats: list[Seat], rank: int) -> tuple[bool, str]:
    """Whether a waiting rank may keep its core busy: only where each has one of its own."""
    here = [seat for seat in seats if seat.host == seats[rank].host]
    hosts = len({seat.host for seat in seats})
    world = dist.get_world_size() if dist.is_initialized() else len(seats)
    ranks = max(len(here), math.ceil(world / hosts))
    cores = len({core for seat in here for core in seat.cores})
    if ranks > cores:
        return False, f"waits sleep, {ranks} ranks share {cores} cores"
    return True, "waits spin, then sleep"


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _name(group: Any) -> str:
    return str(getattr(group, "group_desc", "") or "anonymous")


def _explained(communicator: Communicator, why: str) -> Communicator:
    communicator.explanation = why
    _log.debug("%s: %s", type(communicator).__name__, why)
    return communicator
