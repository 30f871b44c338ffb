"""Functions that the rendezvous tests run on ranks."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from lockstep.distributed import parallel_state as ps
from lockstep.distributed import rendezvous


def _failure(call: Any) -> tuple[str, str, list[int], float]:
    started = time.monotonic()
    try:
        call()
    except rendezvous.RendezvousError as error:
        return error.phase, str(error), error.missing, time.monotonic() - started
    return "", "", [], time.monotonic() - started


def absent(rank: int, world_size: int, port: int) -> Any:
    """Of three ranks, rank 2 never comes."""
    listen = rank == 0
    return _failure(
        lambda: rendezvous.join(rank, 3, rank, "127.0.0.1", port, rendezvous.Listener(port=port).detach() if listen else None, "gloo", 1.0)
    )


def lingering(rank: int, world_size: int) -> Any:
    """All come; rank 1 gets no further than loading."""
    store = ps.shared_store("seats")
    seat = rendezvous.Rendezvous(store, rank, world_size, 1.0, "test")
    seat.meet("first")
    if rank == 1:
        seat.note("loading 61 %")
        ps.get_world_group().barrier()
        return None
    found = _failure(lambda: seat.meet("second", 0.7))
    ps.get_world_group().barrier()
    return found


def nobody_serves(rank: int, world_size: int, port: int) -> Any:
    return _failure(lambda: rendezvous.connect(1, 2, "127.0.0.1", port, None, 0.6))


def late_server(rank: int, world_size: int, port: int) -> float:
    """Rank 1 is there a second before rank 0 binds: it tries again until it is."""
    started = time.monotonic()
    if rank == 0:
        time.sleep(1.0)
    rendezvous.join(rank, world_size, rank, "127.0.0.1", port, None, "gloo", 30.0)
    total = ps.get_world_group().all_reduce(torch.ones(1)).item()
    ps.get_world_group().barrier()
    ps.cleanup_dist_env_and_memory()
    assert total == world_size
    return time.monotonic() - started


def store_fd(rank: int, world_size: int) -> bool:
    """The store closes the descriptor it was given."""
    listener = rendezvous.Listener()
    fd = listener.detach()
    store = rendezvous.connect(0, 1, "127.0.0.1", listener.port, fd, 10)
    store.set("a", "b")
    del store
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.fstat(fd)
        except OSError:
            return True
        time.sleep(0.01)
    return False


def stateless(rank: int, world_size: int, port: int) -> None:
    from lockstep.distributed.stateless import ReduceOp, StatelessProcessGroup
    from tests.distributed.group_jobs import refused

    listener = rendezvous.Listener(port=port) if rank == 0 else None
    group = StatelessProcessGroup.create("127.0.0.1", port, rank, world_size, store_timeout=20, listen_socket=listener)
    # G4: two senders to one receiver do not mix, and order is kept.
    if rank == 0:
        assert group.recv_obj(2) == "from 2, first" and group.recv_obj(1) == "from 1"
        assert group.recv_obj(2) == "from 2, second"
    elif rank == 1:
        group.send_obj("from 1", 0)
    else:
        group.send_obj("from 2, first", 0)
        group.send_obj("from 2, second", 0)
    for src in range(world_size):
        assert group.broadcast_obj((src, "x") if rank == src else None, src) == (src, "x")
    assert group.all_gather_obj({"rank": rank}) == [{"rank": r} for r in range(world_size)]
    x = torch.tensor([rank + 1.0, -rank])
    assert torch.equal(group.broadcast(x, 1), torch.tensor([2.0, -1.0]))
    if rank == 0:
        group.send(torch.arange(6).view(2, 3).t(), 1)
        group.send(torch.arange(6), 1)
    elif rank == 1:
        assert torch.equal(group.recv(torch.empty(3, 2, dtype=torch.int64), 0), torch.arange(6).view(2, 3).t())
        refused(ValueError, "rank 0 sent torch.int64 (6,)", lambda: group.recv(torch.empty(5), 0))
    assert group.all_reduce(x).tolist() == [6.0, -3.0] and x.tolist() == [rank + 1.0, -rank]
    assert group.all_reduce(x, ReduceOp.PRODUCT)[0].item() == 6.0
    assert group.all_reduce(x, ReduceOp.MAX).tolist() == [3.0, 0.0]
    assert group.all_reduce(x, ReduceOp.MIN).tolist() == [1.0, -2.0]
    # G27: an operation that is not supported is refused, not answered wrongly.
    for op in (ReduceOp.BAND, ReduceOp.AVG):
        refused(ValueError, "is not supported", lambda op=op: group.all_reduce(x, op))
    refused(ValueError, "outside 0..2", lambda: group.send_obj(1, 3))
    refused(TypeError, "cannot cross", lambda: group.send_obj(object(), 0))
    if rank == 0:
        refused(TimeoutError, "waited 0.3 s for rank 1", lambda: group._take("send/1/0/99", 1, 0.3))
    group.barrier(20)  # from here on this rank deletes what it wrote, so everybody must have read it
    group.data_expiration_seconds = 0.0
    group._put("old", 1)
    time.sleep(0.01)
    group.expire_data()
    assert not group.store.check(["old"]) or rank != world_size - 1
    group.barrier(20)


def stateless_barrier(rank: int, world_size: int, port: int) -> Any:
    """G27: the timeout is kept and names who is missing; after it, a complete barrier still works."""
    from lockstep.distributed.stateless import StatelessProcessGroup

    listener = rendezvous.Listener(port=port) if rank == 0 else None
    group = StatelessProcessGroup.create("127.0.0.1", port, rank, world_size, listen_socket=listener)
    for _ in range(3):
        group.barrier(20)
    assert group.store.num_keys() < 20
    if rank == 1:
        time.sleep(1.2)
        return None
    started = time.monotonic()
    try:
        group.barrier(0.5)
    except TimeoutError as error:
        took = time.monotonic() - started
        if rank == 0:
            time.sleep(1.0)  # it serves the store
        return str(error), took
    raise AssertionError("the barrier passed without rank 1")


def stateless_torch(rank: int, world_size: int, port: int) -> None:
    """A real torch group beside the default one."""
    from lockstep.distributed.stateless import (
        stateless_destroy_torch_distributed_process_group,
        stateless_init_torch_distributed_process_group,
    )
    from tests.distributed.group_jobs import refused

    listener = rendezvous.Listener(port=port) if rank == 0 else None
    group, store = stateless_init_torch_distributed_process_group(
        "127.0.0.1", port, rank, world_size, "gloo", "dp", return_store=True, listen_socket=listener
    )
    x = torch.tensor([rank + 1.0])
    group.allreduce([x]).wait()
    assert x.item() == world_size * (world_size + 1) / 2 and group.size() == world_size
    assert ps.in_the_same_node_as(group) == [True] * world_size
    store.set(f"done{rank}", "1")
    store.wait([f"done{r}" for r in range(world_size)])
    stateless_destroy_torch_distributed_process_group(group)
    assert not torch.distributed.is_initialized()
    refused(ValueError, "is unknown", lambda: stateless_init_torch_distributed_process_group("127.0.0.1", 1, 1, 2, "smoke", timeout_s=0.2))


def stateless_nodes(rank: int, world_size: int, port: int) -> Any:
    from lockstep.distributed.stateless import StatelessProcessGroup

    listener = rendezvous.Listener(port=port) if rank == 0 else None
    group = StatelessProcessGroup.create("127.0.0.1", port, rank, world_size, listen_socket=listener)
    found = ps.in_the_same_node_as(group, 1), ps._node_count(group)
    group.barrier()
    return found
