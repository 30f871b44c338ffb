"""Which ranks share a host, found by sharing memory: names and addresses lie, memory does not."""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import Any

import torch

from lockstep.distributed import objects
from lockstep.distributed.stateless import StatelessProcessGroup
from lockstep.utils import env, shared_files


def _write_token() -> tuple[str, str, str]:
    """-> (path, token, this host's name): a new file in shared memory that holds the token, readable by this user only.

    The name is empty unless a person gave one: who says that two ranks are on different hosts is believed.
    """
    token, path = secrets.token_hex(64), shared_files.new_path("node")
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        os.write(fd, token.encode())
    finally:
        os.close(fd)
    return path, token, env.host_id()


def _holds(path: str, token: str) -> bool:
    with contextlib.suppress(OSError), open(path) as file:
        return file.read() == token
    return False


def in_the_same_node_as(pg: Any, source_rank: int = 0) -> list[bool]:
    """For each rank of `pg`, whether it shares memory with `source_rank` (both counted in `pg`).

    pg: a torch ProcessGroup with a CPU backend, or a StatelessProcessGroup. Collective over it.
    """
    if isinstance(pg, StatelessProcessGroup):
        rank, size = pg.rank, pg.world_size
    else:
        assert _serves_cpu(pg), "in_the_same_node_as should be tested with a non-NCCL group."
        rank, size = pg.rank(), pg.size()
    path = ""
    try:
        offer = None
        if rank == source_rank:
            offer = _write_token()
            path = offer[0]
        offer = _broadcast(pg, offer, source_rank)
        path_there, token, host = offer
        seen = host == env.host_id() and _holds(path_there, token)
        return _gather_flags(pg, seen, rank, size)
    finally:
        # Every rank has looked: the gather above ended.
        if path:
            os.unlink(path)


def _serves_cpu(pg: Any) -> bool:
    # Asked of the group itself: groups outside the default world are not in torch's tables.
    with contextlib.suppress(RuntimeError):
        return pg._get_backend(torch.device("cpu")) is not None
    return False


def _broadcast(pg: Any, obj: Any, src: int) -> Any:
    if isinstance(pg, StatelessProcessGroup):
        return pg.broadcast_obj(obj, src)
    return objects.broadcast(objects.communicator_of(pg), obj, src)


def _gather_flags(pg: Any, seen: bool, rank: int, size: int) -> list[bool]:
    if isinstance(pg, StatelessProcessGroup):
        return [bool(flag) for flag in pg.all_gather_obj(seen)]
    flags = torch.zeros(size, dtype=torch.int32)
    flags[rank] = int(seen)
    objects.communicator_of(pg).all_reduce_(flags)
    return [bool(flag) for flag in flags.tolist()]


def _node_count(pg: Any) -> int:
    """How many hosts the ranks of `pg` sit on. Collective over it."""
    size = pg.world_size if isinstance(pg, StatelessProcessGroup) else pg.size()
    host_of: dict[int, int] = {}
    while len(host_of) < size:
        source = min(rank for rank in range(size) if rank not in host_of)
        hosts = len(set(host_of.values()))
        for rank, same in enumerate(in_the_same_node_as(pg, source)):
            if same and rank not in host_of:
                host_of[rank] = hosts
        host_of.setdefault(source, hosts)
    return len(set(host_of.values()))
