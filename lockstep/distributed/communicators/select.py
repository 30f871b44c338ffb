"""Which communicator a group gets, and why. Every rank of a group comes to the same answer: all facts are exchanged first."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from lockstep.distributed.communicators.base import Communicator
from lockstep.distributed.communicators.gloo import GlooCommunicator
from lockstep.distributed.communicators.hierarchical import HierarchicalCommunicator
from lockstep.distributed.communicators.segment import (
    MAX_WORLD,
    Seat,
    SegmentError,
    exchange,
    host_identity,
    members_here,
    open_groups,
)
from lockstep.distributed.communicators.shm import ShmCommunicator
from lockstep.kernels.library import library
from lockstep.observability.logging import get_logger
from lockstep.utils import env
from lockstep.utils.cores import quota

_log = get_logger(__name__)
LEADER_GRACE_S = 2.0
CHOICES = ("auto", "gloo", "shm", "hierarchical")


def host_communicator(group: Any, timeout_s: float, chosen: str = "") -> Communicator:
    """The communicator for host memory over the gloo torch group `group`. Collective over it.

    chosen: one of CHOICES, by default what `LOCKSTEP_COMMUNICATOR` says. The result's `explanation` says why it is the one.
    Raises ValueError for a choice that is not known or cannot serve this group.
    """
    chosen = chosen or env.communicator()
    if chosen not in CHOICES:
        raise ValueError(f"LOCKSTEP_COMMUNICATOR={chosen} is not known: use one of {', '.join(CHOICES)}.")
    gloo = GlooCommunicator(group, torch.device("cpu"))
    if chosen == "gloo" or gloo.world_size == 1:
        return _explained(gloo, "LOCKSTEP_COMMUNICATOR says so" if chosen == "gloo" else "a group of one")
    missing = "" if library() is not None else "it has no kernel library"
    seats = exchange(gloo, Seat(host_identity(), _cores(), quota() or 0.0, missing), Seat)
    name = str(getattr(group, "group_desc", "") or "anonymous")
    why_not = _refusal(seats, chosen)
    if not why_not:
        crowded = _crowded(seats, gloo.rank)
        try:
            found = assemble(gloo, [seat.host for seat in seats], name, timeout_s, may_spin=not crowded, spanning=chosen == "hierarchical")
            waits = f"hand the CPU on, then sleep, {crowded}" if crowded else "spin, hand the CPU on, then sleep"
            return _explained(found, f"{found.explanation}; waits {waits}")
        except SegmentError as e:
            why_not = str(e)
    if chosen != "auto":
        raise ValueError(f"LOCKSTEP_COMMUNICATOR={chosen}, but group {name} cannot have it: {why_not}. Unset it, or say gloo.")
    return _explained(gloo, f"no shared memory: {why_not}")


def assemble(
    gloo: GlooCommunicator, hosts: Sequence[str], name: str, timeout_s: float, *, may_spin: bool, spanning: bool = False
) -> Communicator:
    """Shared memory among the ranks of each host; hierarchical where there are several, or `spanning` asks for it.

    hosts: by rank. Collective over `gloo`. Raises SegmentError on all ranks where one of them cannot share memory.
    """
    lib = library()
    here, count = members_here(hosts, gloo.rank), len(set(hosts))
    spanning |= count > 1
    # Who waits for a leader waits longer than the leader does, which knows the cause.
    handle = open_groups(lib, gloo, hosts, name, timeout_s + (LEADER_GRACE_S if spanning else 0.0), may_spin)
    if not spanning:
        shared = ShmCommunicator(lib, handle, gloo.rank, gloo.world_size, gloo)
        return _because(shared, f"{gloo.world_size} ranks on one host")
    inner = ShmCommunicator(lib, handle, here.index(gloo.rank), len(here), None)
    where = f"{gloo.world_size} ranks on {count} host{'s' if count > 1 else ''}, {len(here)} of them here"
    return _because(HierarchicalCommunicator(gloo, inner, hosts, timeout_s), where)


def explain(communicator: Communicator) -> str:
    """The communicator's kind and why it was chosen, e.g. "shm: 2 ranks on one host; waits spin, hand the CPU on, then sleep"."""
    kind = type(communicator).__name__.removesuffix("Communicator").lower()
    return f"{kind}: {communicator.explanation}" if communicator.explanation else kind


def _refusal(seats: Sequence[Seat], chosen: str) -> str:
    """Why these ranks cannot have shared memory; "" if they can try."""
    for rank, seat in enumerate(seats):
        if seat.missing:
            return f"rank {rank}: {seat.missing}"
    hosts = [seat.host for seat in seats]
    most = max(map(hosts.count, hosts))
    if most > MAX_WORLD:
        return f"{most} ranks on one host are more than {MAX_WORLD}"
    if most == 1 and chosen != "hierarchical":
        return "every rank has a host of its own"
    if chosen == "shm" and len(set(hosts)) > 1:
        return f"its ranks are on {len(set(hosts))} hosts"
    return ""


def _crowded(seats: Sequence[Seat], rank: int) -> str:
    """Why a waiting rank must not keep its core busy; "" where each rank on this host has one of its own."""
    from lockstep.distributed import parallel_state

    here = [seat for seat in seats if seat.host == seats[rank].host]
    hosts = max(len({seat.host for seat in seats}), parallel_state._STATE.node_count or 1)
    world = dist.get_world_size() if dist.is_initialized() else len(seats)
    ranks = max(len(here), math.ceil(world / hosts))
    cores: float = len({core for seat in here for core in seat.cores})
    limits = [seat.quota for seat in here if seat.quota]
    cores = min([cores, *limits])
    return f"since {ranks} ranks share {cores:g} CPUs" if ranks > cores else ""


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _because(communicator: Communicator, why: str) -> Communicator:
    communicator.explanation = why
    return communicator


def _explained(communicator: Communicator, why: str) -> Communicator:
    _because(communicator, why)
    _log.debug("communicator: %s", explain(communicator))
    return communicator
