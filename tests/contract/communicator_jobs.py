"""One suite for every communicator: each check is a function of (communicator, rank, world_size) that asserts."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from lockstep.distributed import parallel_state as ps
from lockstep.distributed.communicators.base import Communicator
from lockstep.distributed.communicators.gloo import GlooCommunicator
from lockstep.distributed.communicators.loopback import LoopbackCommunicator
from lockstep.distributed.communicators.select import host_communicator
from lockstep.distributed.communicators.staged import StagedCommunicator
from lockstep.distributed.reduction_tree import ReductionTree, subtrees

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.float64, torch.int16]
SUMMED = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.float64]


def values(shape: tuple[int, ...], dtype: torch.dtype, rank: int, salt: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    return torch.randint(0, 2 if dtype == torch.bool else 50, shape, generator=generator).to(dtype)


def by_rank(shape: tuple[int, ...], dtype: torch.dtype, size: int, salt: int = 0) -> list[torch.Tensor]:
    return [values(shape, dtype, rank, salt) for rank in range(size)]


def same(found: torch.Tensor | None, expected: torch.Tensor, device: torch.device) -> None:
    assert found is not None and found.dtype == expected.dtype and found.shape == expected.shape
    assert found.device.type == device.type and found.is_contiguous()
    assert torch.equal(found.cpu(), expected)


def tree(lo: int, hi: int, leaves: list[torch.Tensor]) -> torch.Tensor:
    """The order of additions: cut at the largest power of two below the number of leaves."""
    mid = lo + max(1 << i for i in range(8) if 1 << i < max(hi - lo, 2))
    return leaves[lo] if hi - lo == 1 else tree(lo, mid, leaves) + tree(mid, hi, leaves)


def all_reduce(c: Communicator, rank: int, size: int) -> None:
    for dtype in SUMMED:
        parts = by_rank((3, 5), dtype, size)
        x = parts[rank].clone().to(c.device)
        c.all_reduce_(x)
        same(x, sum(p.to(torch.int64 if not dtype.is_floating_point else torch.float64) for p in parts).to(dtype), c.device)
    scalar = torch.tensor(float(rank + 1), device=c.device)
    c.all_reduce_(scalar)
    assert scalar.shape == () and scalar.item() == size * (size + 1) / 2
    strided = values((4, 6), torch.float32, rank).to(c.device).t()
    c.all_reduce_(strided)
    assert torch.equal(strided.cpu(), sum(by_rank((4, 6), torch.float32, size)).t())
    empty = torch.empty(0, 3, device=c.device)
    c.all_reduce_(empty)
    for dtype in (torch.float32, torch.float64):
        noise = torch.randn(1000, dtype=dtype, generator=torch.Generator().manual_seed(rank)).to(c.device)
        c.all_reduce_(noise)
        bits = c.all_gather(noise.view(torch.int32)[None], 0)
        assert (bits == bits[0]).all(), f"ranks ended with different bits of {dtype}"


def all_gather(c: Communicator, rank: int, size: int) -> None:
    for dtype in DTYPES:
        for dim in range(3):
            parts = by_rank((2, 3, 4), dtype, size)
            before = parts[rank].to(c.device)
            kept = before.clone()
            same(c.all_gather(before, dim), torch.cat(parts, dim), c.device)
            assert torch.equal(before, kept)
    strided = values((4, 6), torch.float32, rank).to(c.device).t()
    same(c.all_gather(strided, 1), torch.cat([p.t() for p in by_rank((4, 6), torch.float32, size)], 1), c.device)
    same(c.all_gather(torch.empty(0, 3, device=c.device), 0), torch.empty(0, 3), c.device)


def all_gatherv(c: Communicator, rank: int, size: int) -> None:
    for sizes in ([2] * size, list(range(size)), list(range(size, 0, -1)), [0] * (size - 1) + [3]):
        for dim in range(2):
            shape = lambda r: (sizes[r], 3) if dim == 0 else (3, sizes[r])  # noqa: E731, B023
            parts = [values(shape(r), torch.bfloat16, r) for r in range(size)]
            same(c.all_gatherv(parts[rank].to(c.device), sizes, dim), torch.cat(parts, dim), c.device)


def reduce_scatter(c: Communicator, rank: int, size: int) -> None:
    for dtype in SUMMED:
        for dim in range(3):
            shape = [2, 3, 5]
            shape[dim] *= size
            parts = by_rank(tuple(shape), dtype, size)
            total = sum(p.to(torch.float64) for p in parts).to(dtype)
            same(c.reduce_scatter(parts[rank].to(c.device), dim), total.chunk(size, dim)[rank].contiguous(), c.device)
    # Half precision: summed in float32 in the tree, rounded once. (A few 16-bit numbers of one size would add up exactly.)
    parts = [torch.randn(size * 64, generator=torch.Generator().manual_seed(r)).exp().pow(9).bfloat16() for r in range(size)]
    total = tree(0, size, [part.float() for part in parts])
    same(c.reduce_scatter(parts[rank].to(c.device), 0), total.bfloat16().chunk(size)[rank], c.device)


def reduce_scatterv(c: Communicator, rank: int, size: int) -> None:
    for sizes in ([2] * size, list(range(size)), [4] + [0] * (size - 1)):
        for dim in range(2):
            shape = (sum(sizes), 3) if dim == 0 else (3, sum(sizes))
            parts = by_rank(shape, torch.float32, size)
            expected = sum(parts).split(sizes, dim)[rank].contiguous()
            same(c.reduce_scatterv(parts[rank].to(c.device), sizes, dim), expected, c.device)


def gather(c: Communicator, rank: int, size: int) -> None:
    for dst in range(size):
        for dim in range(2):
            parts = by_rank((2, 3), torch.int16, size, dst)
            found = c.gather(parts[rank].to(c.device), dst, dim)
            if rank == dst:
                same(found, torch.cat(parts, dim), c.device)
            else:
                assert found is None


def largest(c: Communicator, rank: int, size: int) -> None:
    for rows in (1, 7, 301):
        # Few different values, so that ranks have the same ones.
        parts = [values((rows,), torch.float32, r, rows) % 5 for r in range(size)]
        parts[size // 2][rows // 2] = float("nan")
        parts[-1][0] = float("inf")
        parts[0][rows - 1] = -float("inf")
        ids = [torch.arange(rows) * 1000 + r for r in range(size)]
        wanted = torch.stack(ids).gather(0, torch.from_numpy(torch.stack(parts).numpy().argmax(0))[None])[0]
        same(c.largest(parts[rank].to(c.device), ids[rank].to(c.device)), wanted, c.device)
    same(c.largest(torch.full((3,), -torch.inf, device=c.device), torch.full((3,), rank, device=c.device)), torch.zeros(3).long(), c.device)
    same(c.largest(torch.empty(0, device=c.device), torch.empty(0, dtype=torch.int64, device=c.device)), torch.empty(0).long(), c.device)


def broadcast(c: Communicator, rank: int, size: int) -> None:
    for src in range(size):
        for dtype in DTYPES:
            x = values((3, 2), dtype, rank, src).to(c.device)
            c.broadcast_(x, src)
            same(x, values((3, 2), dtype, src, src), c.device)
    strided = values((3, 2), torch.float32, rank).to(c.device).t()
    c.broadcast_(strided, size - 1)
    assert torch.equal(strided.cpu(), values((3, 2), torch.float32, size - 1).t())
    scalar = torch.tensor(float(rank), device=c.device)
    c.broadcast_(scalar, size - 1)
    assert scalar.item() == size - 1


def all_to_all(c: Communicator, rank: int, size: int) -> None:
    for dtype in DTYPES:
        parts = by_rank((2 * size, 3), dtype, size)
        expected = torch.cat([p[2 * rank : 2 * rank + 2] for p in parts])
        same(c.all_to_all(parts[rank].to(c.device)), expected, c.device)


def all_to_allv(c: Communicator, rank: int, size: int) -> None:
    for seed in range(4):
        counts = [[random.Random(f"{seed} {a} {b}").randrange(0, 3) for b in range(size)] for a in range(size)]
        parts = [values((sum(counts[a]), 2), torch.float32, a, seed) for a in range(size)]
        expected = torch.cat([parts[a].split(counts[a])[rank] for a in range(size)])
        found = c.all_to_allv(parts[rank].to(c.device), counts[rank], [counts[a][rank] for a in range(size)])
        same(found, expected, c.device)


def send_recv(c: Communicator, rank: int, size: int) -> None:
    if size == 1 and not isinstance(c, LoopbackCommunicator):
        return  # libraries refuse to send to themselves; the coordinator never asks for it
    following, previous = (rank + 1) % size, (rank - 1) % size
    for dtype in DTYPES:
        handle = c.isend(values((4, 3), dtype, rank).to(c.device).t(), following)
        x = torch.empty(3, 4, dtype=dtype, device=c.device)
        c.recv_(x, previous)
        handle.wait()
        assert handle.is_completed()
        same(x, values((4, 3), dtype, previous).t().contiguous(), c.device)
    # Order is kept, and a polled handle completes without anybody waiting for it.
    first, second = torch.tensor([1.0 + rank], device=c.device), torch.tensor([10.0 + rank], device=c.device)
    sent = [c.isend(first, following), c.isend(second, following)]
    got = [torch.empty(1, device=c.device) for _ in range(2)]
    handles = [c.irecv_(x, previous) for x in got]
    for handle in (*handles, *sent):
        while not handle.is_completed():
            pass
        handle.wait()
        handle.wait()
    assert [x.item() for x in got] == [1.0 + previous, 10.0 + previous]
    if rank == 0 and size > 1:
        c.send(first, 1)
    elif rank == 1:
        c.recv_(got[0], 0)
        assert got[0].item() == 1.0


def combine(c: Communicator, rank: int, size: int) -> None:
    """The bits are those of one rank that holds all atoms, however they are dealt out and whichever way the sum takes."""
    for total in (size, 8, 13):
        if total < size:
            continue
        runs = [(total * r // size, total * (r + 1) // size) for r in range(size)]
        order = ReductionTree.of(total, runs)
        for rows, n in ((1, 1), (3, 37), (2, 40000)):
            atoms = [torch.randn(rows, n, generator=torch.Generator().manual_seed(a)) for a in range(total)]
            nodes = subtrees(total, *runs[rank])
            mine = torch.stack([tree(lo, hi, atoms) for lo, hi in nodes])
            same(c.combine(mine.to(c.device), order), tree(0, total, atoms), c.device)


def barrier(c: Communicator, rank: int, size: int) -> None:
    """Nobody leaves before the last has come: each adds one on arrival, and finds all there afterwards."""
    store = ps.shared_store("contract") if size > 1 else None
    for turn in range(5):
        if store is not None:
            store.add(f"{turn}", 1)
        c.barrier()
        assert store is None or store.add(f"{turn}", 0) == size


CHECKS: dict[str, Callable[[Communicator, int, int], None]] = {
    f.__name__: f
    for f in (
        all_reduce, all_gather, all_gatherv, reduce_scatter, reduce_scatterv, gather, largest,
        broadcast, all_to_all, all_to_allv, combine, send_recv, barrier,
    )
}  # fmt: skip


def _shm(group: Any) -> Communicator:
    """With slots and rings so small that nearly everything goes through them in several turns."""
    from lockstep.distributed.communicators import segment
    from lockstep.distributed.communicators.shm import ShmCommunicator
    from lockstep.kernels.library import library

    gloo = GlooCommunicator(group, torch.device("cpu"))
    handle = segment.open_groups(library(), gloo, ["here"] * gloo.world_size, "contract", 60.0, True, slot_bytes=1 << 16, ring_bytes=64)
    return ShmCommunicator(library(), handle, gloo.rank, gloo.world_size, gloo)


def _hierarchical(group: Any, hosts: str) -> Communicator:
    """hosts: a letter for each rank's host."""
    from lockstep.distributed.communicators import select

    return select.assemble(GlooCommunicator(group, torch.device("cpu")), list(hosts), "contract", 60.0, may_spin=False, spanning=True)


def run(rank: int, world_size: int, kind: str, check: str) -> str:
    ps.initialize_model_parallel(tensor_model_parallel_size=world_size)
    tp, cpu = ps.get_tp_group(), torch.device("cpu")
    kinds: dict[str, Callable[[], Any]] = {
        "loopback": LoopbackCommunicator,
        "gloo": lambda: GlooCommunicator(tp.cpu_group, cpu),
        "shm": lambda: host_communicator(tp.cpu_group, 60.0),
        "shm-small": lambda: _shm(tp.cpu_group),
        "hierarchical": lambda: _hierarchical(tp.cpu_group, hosts),
        "staged": lambda: StagedCommunicator(GlooCommunicator(tp.cpu_group, cpu), cpu),
        "staged-cuda": lambda: StagedCommunicator(GlooCommunicator(tp.cpu_group, cpu), torch.device("cuda", 0)),
    }
    kind, _, hosts = kind.partition(":")
    communicator = kinds[kind]()
    assert type(communicator).__name__.lower().startswith(kind.partition("-")[0]), communicator.explanation
    assert (communicator.rank, communicator.world_size) == (rank, world_size)
    CHECKS[check](communicator, rank, world_size)
    communicator.close()
    communicator.close()
    return "passed"


def run_nccl(rank: int, world_size: int, check: str) -> str:
    from lockstep.distributed import process_groups
    from lockstep.distributed.communicators.nccl import NcclCommunicator

    group = process_groups.make_subgroup([list(range(world_size))], rank, "nccl", None, "contract")
    CHECKS[check](NcclCommunicator(group, torch.device("cuda", rank)), rank, world_size)
    return "passed"
