"""What ranks do in the tests of shared-memory groups: go wrong in every way, and say what they saw."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from lockstep.distributed import parallel_state as ps
from lockstep.distributed.communicators import segment
from lockstep.distributed.communicators.base import Communicator
from lockstep.distributed.communicators.gloo import GlooCommunicator
from lockstep.distributed.communicators.select import assemble, explain, host_communicator
from lockstep.distributed.reduction_tree import ReductionTree
from lockstep.kernels.library import library
from lockstep.kernels.packed import PackedLinear
from lockstep.kernels.program import Program, StepArgs

BIG = 3 << 20  # more than a ring holds


def shared(timeout_s: float = 30.0, may_spin: bool = True) -> Communicator:
    gloo = GlooCommunicator(ps.get_world_group().cpu_group, torch.device("cpu"))
    return assemble(gloo, ["here"] * gloo.world_size, "test", timeout_s, may_spin=may_spin)


CALLS: dict[str, Callable[[Communicator], Any]] = {
    "barrier": lambda c: c.barrier(),
    "all_reduce": lambda c: c.all_reduce_(torch.zeros(1000)),
    "large all_reduce": lambda c: c.all_reduce_(torch.zeros(1 << 20)),
    "all_gather": lambda c: c.all_gather(torch.zeros(1000), 0),
    "all_to_all": lambda c: c.all_to_all(torch.zeros(c.world_size, 10)),
    "recv": lambda c: c.recv_(torch.zeros(10), 1),
    "send": lambda c: c.send(torch.zeros(BIG), 1),
}


def outcome(call: Callable[[], Any]) -> tuple[str, float]:
    """The error that the call raised ("" if none), and how long it took."""
    began = time.monotonic()
    try:
        call()
    except RuntimeError as error:
        return str(error), time.monotonic() - began
    return "", time.monotonic() - began


def killed(rank: int, world_size: int, name: str) -> Any:
    c = shared()
    c.barrier()
    if rank == 1:
        time.sleep(0.3)  # the others wait by now
        os.kill(os.getpid(), signal.SIGKILL)
    found = outcome(lambda: CALLS[name](c)), outcome(c.barrier)
    ps.cleanup_dist_env_and_memory()  # the world is not whole any more: nobody can meet at the end
    return found


def late(rank: int, world_size: int) -> Any:
    """Rank 1 comes after the others' patience; then it is told so in turn."""
    c = shared(timeout_s=0.5)
    c.broadcast_(torch.zeros(4), 0)
    if rank == 1:
        time.sleep(2.0)
        c.barrier()  # everybody else had come to this one
        return outcome(c.barrier)
    return outcome(c.barrier), outcome(c.barrier)


def left(rank: int, world_size: int) -> Any:
    c = shared()
    c.barrier()
    if rank == 1:
        time.sleep(0.3)
        c.close()
        return None
    return outcome(c.barrier)


DIFFERENT: dict[str, tuple[Callable[[Communicator], Any], Callable[[Communicator], Any]]] = {
    "operation": (lambda c: c.all_reduce_(torch.zeros(4)), lambda c: c.all_gather(torch.zeros(4), 0)),
    "size": (lambda c: c.all_reduce_(torch.zeros(4)), lambda c: c.all_reduce_(torch.zeros(5))),
    "dtype": (lambda c: c.all_reduce_(torch.zeros(4)), lambda c: c.all_reduce_(torch.zeros(8, dtype=torch.bfloat16))),
    "transfer": (lambda c: c.recv_(torch.zeros(4), 1), lambda c: c.send(torch.zeros(5), 0)),
    "source": (lambda c: c.broadcast_(torch.zeros(4), 0), lambda c: c.broadcast_(torch.zeros(4), 1)),
    "destination": (lambda c: c.gather(torch.zeros(4), 0, 0), lambda c: c.gather(torch.zeros(4), 1, 0)),
    "shares": (lambda c: c.all_gatherv(torch.zeros(3), [3, 1], 0), lambda c: c.all_gatherv(torch.zeros(3), [1, 3], 0)),
    "summed shares": (lambda c: c.reduce_scatterv(torch.zeros(4), [3, 1], 0), lambda c: c.reduce_scatterv(torch.zeros(4), [1, 3], 0)),
    "rows": (lambda c: c.all_to_allv(torch.zeros(4), [2, 2], [2, 1]), lambda c: c.all_to_allv(torch.zeros(4), [2, 2], [2, 2])),
}


def lost_beyond(rank: int, world_size: int, hosts: str, how: str) -> Any:
    """The last rank, on another host than the first, dies or is late."""
    gloo = GlooCommunicator(ps.get_world_group().cpu_group, torch.device("cpu"))
    c = assemble(gloo, list(hosts), "test", 1.0 if how == "late" else 30.0, may_spin=False)
    c.all_reduce_(torch.zeros(4))
    if rank == world_size - 1:
        time.sleep(0.3)  # the others wait by now
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(5.0)
        return "late"
    found = outcome(lambda: c.all_reduce_(torch.zeros(4)))
    ps.cleanup_dist_env_and_memory()
    return found


def interrupted(rank: int, world_size: int, call: str) -> Any:
    """Rank 0 gets SIGINT while it waits for rank 1."""
    c = shared()
    c.barrier()
    if rank == 1:
        time.sleep(1.5)
        outcome(c.barrier)  # rank 0 may have come to this one
        return outcome(c.barrier)[0]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    try:
        CALLS[call](c)
        kind = "nothing"
    except KeyboardInterrupt:
        kind = "KeyboardInterrupt"
    took, after = time.monotonic() - began, outcome(c.barrier)[0]
    time.sleep(2.0)  # rank 1 has looked
    return kind, took, after


def different(rank: int, world_size: int, what: str) -> Any:
    c = shared()
    found = outcome(lambda: DIFFERENT[what][rank](c))
    time.sleep(0.5)  # both have looked before one is gone
    return found


def waiting(rank: int, world_size: int, how: str) -> float:
    """Seconds of processor time that a wait of 1.5 s cost."""
    c = shared(may_spin=False) if how == "sleeps" else host_communicator(ps.get_world_group().cpu_group, 30.0)
    c.barrier()
    if rank == 0:
        time.sleep(1.5)
    began = time.process_time()
    c.barrier()
    used = time.process_time() - began
    c.barrier()
    return used


def traces(rank: int, world_size: int) -> dict[str, Any]:
    """What a group leaves where others could see it."""
    opened: list[int] = []
    plain = os.open

    def watched(path: Any, *args: Any, **kwargs: Any) -> int:
        fd = plain(path, *args, **kwargs)
        if str(path).startswith("/proc/") and "/fd/" in str(path):
            opened.append(os.fstat(fd).st_mode & 0o777)
        return fd

    before = set(os.listdir("/dev/shm"))
    os.open = watched  # type: ignore[assignment]
    try:
        c = shared()
    finally:
        os.open = plain
    c.all_reduce_(torch.zeros(1 << 20))
    with open("/proc/self/maps") as file:
        mapped = sum("memfd:lockstep" in line for line in file)
    links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]
    result = {
        "named": sorted(set(os.listdir("/dev/shm")) - before),
        "descriptors": sum("memfd:lockstep" in link for link in links),
        "modes": opened,
        "mapped": mapped,
    }
    c.barrier()
    c.close()
    with open("/proc/self/maps") as file:
        result["mapped after"] = sum("memfd:lockstep" in line for line in file)
    return result


def cannot_open(rank: int, world_size: int) -> str:
    """Rank 1 may not open the segment: nobody uses it."""
    if rank == 1:

        def refuse(path: Any, *_: Any, **__: Any) -> int:
            raise PermissionError(13, "Permission denied", str(path))

        plain, os.open = os.open, refuse  # type: ignore[assignment]
    try:
        c = host_communicator(ps.get_world_group().cpu_group, 30.0)
    except ValueError as error:
        return f"ValueError: {error}"
    finally:
        if rank == 1:
            os.open = plain
    c.all_reduce_(torch.zeros(4))
    return explain(c)


def chosen(rank: int, world_size: int, hosts: str) -> str:
    """The automatic choice where rank r sits on host hosts[r]."""
    os.environ["LOCKSTEP_HOST_ID"] = hosts[rank]
    c = host_communicator(ps.get_world_group().cpu_group, 30.0)
    x = torch.full((3,), float(rank + 1))
    c.all_reduce_(x)
    assert (x == world_size * (world_size + 1) / 2).all()
    return explain(c)


def both_send_first(rank: int, world_size: int) -> None:
    c = shared()
    for elements in (0, 10, BIG):
        handles = [(peer, c.isend(torch.full((elements,), float(rank)), peer)) for peer in range(world_size) if peer != rank]
        for peer, _ in handles:
            x = torch.empty(elements)
            c.recv_(x, peer)
            assert (x == peer).all()
        for _, handle in handles:
            handle.wait()
    c.barrier()


def nobody_waits(rank: int, world_size: int) -> float:
    """Rank 0 starts a send larger than the ring, forgets the handle and does something else; the receiver is served."""
    c = shared()
    if rank == 0:
        c.isend(torch.arange(float(BIG)), 1)
        gc.collect()
        torch.full((BIG,), -1.0)  # would take the freed memory
        time.sleep(3.0)
        c.barrier()
        return 0.0
    x = torch.empty(BIG)
    began = time.monotonic()
    c.recv_(x, 0)
    took = time.monotonic() - began
    assert torch.equal(x, torch.arange(float(BIG)))
    c.barrier()
    return took


def crossing(rank: int, world_size: int) -> None:
    """A send under way does not keep collectives from meeting, nor the other way round."""
    c = shared()
    x = torch.full((BIG,), float(rank))
    handle = c.isend(x, (rank + 1) % world_size)
    total = torch.ones(100)
    c.all_reduce_(total)
    assert (total == world_size).all()
    got = torch.empty(BIG)
    incoming = c.irecv_(got, (rank - 1) % world_size)
    c.barrier()
    incoming.wait()
    handle.wait()
    assert (got == (rank - 1) % world_size).all()
    c.barrier()


def one_way_or_another(rank: int, world_size: int) -> None:
    """The same bits at any size, so whichever way a sum took: those of the tree in float32, rounded once."""
    from tests.contract.communicator_jobs import tree

    for may_spin in (True, False):
        c = shared(may_spin=may_spin)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            count = 1_300_003
            parts = [torch.randn(count, generator=torch.Generator().manual_seed(r)).exp().to(dtype) for r in range(world_size)]
            whole = parts[rank].clone()
            c.all_reduce_(whole)
            assert torch.equal(whole, tree(0, world_size, [p.float() for p in parts]).to(dtype))
            pieces = parts[rank].clone()
            for piece in pieces.split(1001)[:40]:
                c.all_reduce_(piece)
            assert torch.equal(pieces[:40040], whole[:40040])
        c.barrier()
        c.close()


def memory_is_shared(rank: int, world_size: int) -> bool:
    """Rank 1 opens something else than rank 0's segment, as in another container: it is noticed."""
    if rank == 1:
        plain = os.open
        other = os.memfd_create("other")
        with open(f"/proc/self/fd/{other}", "r+b") as file:
            file.truncate(segment_size())
        os.open = lambda path, *a, **k: os.dup(other) if "/fd/" in str(path) else plain(path, *a, **k)  # type: ignore[assignment]
    try:
        shared()
    except segment.SegmentError as error:
        return "is not the segment of rank 0" in str(error)
    finally:
        if rank == 1:
            os.open = plain
    return False


def segment_size() -> int:
    from lockstep.kernels.library import library

    lib: Any = library()
    return int(lib.shm_bytes(2, segment.SLOT_BYTES, segment.RING_BYTES))


def products_one_way_or_another(rank: int, world_size: int) -> None:
    """Row-parallel products have the same bits whichever way ranks add their partial sums, and for every number of tokens.

    Ranks that share cores add what is there when they come; others meet first. Who has how many partial sums is uneven.
    """
    atoms, size, hidden = 8, 16, 160
    borders = [atoms * r // world_size for r in range(world_size + 1)]
    tree = ReductionTree.of(atoms, list(pairwise(borders)))
    generator = torch.Generator().manual_seed(7)
    weight, x = (torch.randn(n, atoms * size, generator=generator) for n in (hidden, 700))
    first, stop = borders[rank], borders[rank + 1]
    mine = slice(first * size, stop * size)
    packed = PackedLinear(weight[:, mine].contiguous(), bounds=[i * size for i in range(stop - first + 1)], first=first, total=atoms)
    found = [
        _product(packed, x[:, mine].contiguous(), tree, may_spin, threads) for may_spin, threads in ((True, 1), (False, 1), (False, 2))
    ]
    torch.testing.assert_close(found[0][-1], x @ weight.T, rtol=1e-4, atol=1e-4)
    for streams in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(streams, found[0], strict=True))
    assert all(torch.equal(stream, found[0][-1][: len(stream)]) for stream in found[0])


def _product(packed: PackedLinear, x: torch.Tensor, tree: ReductionTree, may_spin: bool, threads: int) -> list[torch.Tensor]:
    """The streams `[tokens, hidden]` after the product of the first 1, 2, ... rows of x, each begun at zero."""
    lib: Any = library()
    c = shared(may_spin=may_spin)
    code, counts = (torch.tensor(numbers, dtype=torch.int32) for numbers in (tree.code, tree.counts))
    stream, normed = torch.zeros(len(x), packed.shape[0]), torch.empty(len(x), packed.shape[0])
    finish = lib.finish_new(0, 0, 0, stream.data_ptr(), 0, normed.data_ptr(), packed.shape[0], 1e-6, False)
    program, step = Program(lib), StepArgs(lib)
    group = c.native_handle  # type: ignore[attr-defined]
    program.add(
        "row", lib.op_row(packed.handle, x.data_ptr(), x.shape[1], 0, group, code.data_ptr(), len(tree.code), counts.data_ptr(), finish, 1)
    )
    lib.finish_free(finish)
    lib.team_set(threads, 0, 0)
    found = []
    for tokens in (1, 2, 5, 33, 200, len(x)):
        stream.zero_()
        step.set_rows(tokens)
        program.run(step)
        found.append(stream[:tokens].clone())
    lib.team_set(1, 0, 0)
    c.barrier()
    c.close()
    return found
