"""One piece of memory for the ranks of a group that share a host: made, opened and agreed on by all, or by none.

It is a memfd: it has no name, so nothing can be left behind, and the kernel frees it with its last user. The first rank of
a host creates it (mode 0600), the others open it as /proc/PID/fd/N of that rank while it waits. A secret in it tells them
that they opened the right one: the same pid means another process in another container.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from lockstep.distributed.communicators.base import Communicator
from lockstep.utils import env

SLOT_BYTES = 4 << 20
RING_BYTES = 1 << 20
MAX_WORLD = 64  # comm_shm.h


class SegmentError(RuntimeError):
    """The ranks cannot share memory. The message says which rank could not, and why."""


class Seat(msgspec.Struct, frozen=True):
    """Where a rank sits.

    host: ranks with the same one can share memory. cores: CPUs it may run on. quota: how much CPU time in all, 0: no limit.
    missing: why it cannot share memory, "" if it can.
    """

    host: str
    cores: list[int]
    quota: float
    missing: str


class _Offer(msgspec.Struct, frozen=True):
    pid: int = 0
    fd: int = -1
    token: str = ""
    error: str = ""


def host_identity() -> str:
    """The kernel that this process runs on and its view of processes, or `LOCKSTEP_HOST_ID`."""
    if chosen := env.host_id():
        return chosen
    parts = [os.uname().nodename]
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            parts = [file.read().strip()]
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def exchange(comm: Communicator, mine: Any, kind: type[Any]) -> list[Any]:
    """Every rank's struct, by rank. Collective over `comm`."""
    data = msgspec.msgpack.encode(mine)
    sizes = comm.all_gather(torch.tensor([len(data)]), 0).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = comm.all_gather(padded[None], 0).numpy()
    return [msgspec.msgpack.decode(part[:size].tobytes(), type=kind) for part, size in zip(parts, sizes, strict=True)]


def members_here(hosts: Sequence[str], rank: int) -> list[int]:
    """The ranks on the host of `rank`, ascending."""
    return [r for r, host in enumerate(hosts) if host == hosts[rank]]


def open_groups(
    lib: Any,
    comm: Communicator,
    hosts: Sequence[str],
    name: str,
    timeout_s: float,
    may_spin: bool,
    slot_bytes: int = SLOT_BYTES,
    ring_bytes: int = RING_BYTES,
) -> int:
    """The kernel library's group of this rank and the others on its host. Collective over `comm`.

    may_spin: the same on all ranks of a host. Raises SegmentError on every rank when one could not create or open its segment.
    """
    here = members_here(hosts, comm.rank)
    place, world, numbers = here.index(comm.rank), len(here), array("q", here)
    size = lib.shm_bytes(world, slot_bytes, ring_bytes)
    offer, fd, group, error = _Offer(), -1, 0, ""
    try:
        if place == 0:
            offer, fd = _create(size)
        offers = exchange(comm, offer, _Offer)
        offer = offers[here[0]]
        error = offer.error
        if not error:
            try:
                fd = fd if place == 0 else os.open(f"/proc/{offer.pid}/fd/{offer.fd}", os.O_RDWR | os.O_CLOEXEC)
                group = lib.shm_new(fd, place, world, slot_bytes, ring_bytes, timeout_s, may_spin, name, numbers.buffer_info()[0])
                if place == 0:
                    lib.shm_sign(group, offer.token)
            except (OSError, RuntimeError, ValueError) as e:
                error = f"rank {comm.rank}: {e}"
        comm.barrier()  # the first of each host has signed
        if group and not lib.shm_signed(group, offer.token):
            error = f"rank {comm.rank}: /proc/{offer.pid}/fd/{offer.fd} is not the segment of rank {here[0]}"
        errors = [found for found in exchange(comm, error, str) if found]
    except BaseException:
        _release(lib, group)
        raise
    finally:
        if fd >= 0:
            os.close(fd)
    if errors:
        _release(lib, group)
        raise SegmentError(errors[0])
    return group


def _create(size: int) -> tuple[_Offer, int]:
    fd = -1
    try:
        fd = os.memfd_create("lockstep", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, size)
        # Nobody can cut it under us, which would kill every rank that touches it.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except (OSError, AttributeError) as e:
        if fd >= 0:
            os.close(fd)
        return _Offer(error=f"memfd_create: {e}"), -1
    return _Offer(os.getpid(), fd, secrets.token_hex(15)), fd


def _release(lib: Any, group: int) -> None:
    if group:
        lib.shm_free(group)
