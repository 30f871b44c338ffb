"""Functions that the parallel state tests run on ranks."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lockstep.distributed import collectives, process_groups, topology
from lockstep.distributed import parallel_state as ps
from lockstep.distributed.groups import ParallelGroups
from lockstep.distributed.rendezvous import choose_interface
from lockstep.utils import env
from tests.distributed.group_jobs import refused

GETTERS = {
    "world": ps.get_world_group,
    "tp": ps.get_tp_group,
    "pp": ps.get_pp_group,
    "dp": ps.get_dp_group,
    "pcp": ps.get_pcp_group,
    "dcp": ps.get_dcp_group,
    "ep": ps.get_ep_group,
    "eplb": ps.get_eplb_group,
    "inner_dp_world": ps.get_inner_dp_world_group,
}


def _loops() -> int:
    """Gloo's threads that watch sockets, in this process."""
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()].count("gloo_tcp_loop")


def event_loops(rank: int, world_size: int) -> tuple[int, int, bool]:
    """How many event loops a rank of several groups has, which have all been used; and after the end; whether a fork makes its own."""
    ps.initialize_model_parallel(2, world_size // 2)
    for group in (ps.get_world_group(), ps.get_tp_group(), ps.get_pp_group()):
        dist.barrier(group.cpu_group)
        dist.barrier(group.device_group)
    dist.barrier(process_groups.make_lonely_group(rank, "gloo"))
    used, mine = _loops(), process_groups._devices()
    child = os.fork()
    if child == 0:
        os._exit(7 if process_groups._devices() is not mine else 1)
    forked = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    del mine, group
    ps.destroy_model_parallel()
    ps.destroy_distributed_environment()
    gc.collect()
    deadline = time.monotonic() + 30  # a thread that has been joined is listed until the kernel is done with it
    while _loops() and time.monotonic() < deadline:
        time.sleep(0.01)
    return used, _loops(), forked


def layout(rank: int, world_size: int, sizes: dict[str, int]) -> dict[str, Any]:
    """This rank's group of every name, each proved by a sum over it."""
    ps.initialize_model_parallel(
        sizes.get("tp", 1),
        sizes.get("pp", 1),
        sizes.get("pcp", 1),
        sizes.get("dcp", 1),
        data_parallel_size=sizes.get("dp", 1),
        enable_eplb=True,
    )
    grid = topology.Topology(world_size, **sizes)
    assert ps.get_topology() == grid
    for name, getter in GETTERS.items():
        group = getter()
        assert group.ranks == grid.group_of(name, rank), name
        assert group.all_reduce(torch.tensor([float(rank)])).item() == sum(group.ranks)
        assert group.rank_in_group == group.ranks.index(rank) and group.name == name
    assert ps.get_context_model_parallel_group() is ps.get_dcp_group()
    assert (ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()) == (grid.rank_in_group("tp", rank), grid.tp)
    assert (ps.get_decode_context_model_parallel_rank(), ps.get_decode_context_model_parallel_world_size()) == (
        grid.rank_in_group("dcp", rank),
        grid.dcp,
    )
    assert ps.is_global_first_rank() == (rank == 0) == ps.is_local_first_rank()
    groups = ParallelGroups.current()
    assert groups.tp is ps.get_tp_group() and groups.ep is ps.get_ep_group() and groups.replica is ps.get_inner_dp_world_group()
    assert ps.get_eplb_group() is not ps.get_ep_group()
    return {
        "suffix": ps.get_worker_rank_suffix(),
        "other": ps.get_worker_rank_suffix(0),
        **{name: getter().ranks for name, getter in GETTERS.items()},
    }


def life(rank: int, world_size: int) -> None:
    """Before, between and after: what is there, what is refused, and that init works again."""
    for name, getter in GETTERS.items():
        if name != "world":
            refused(AssertionError, "not initialized", getter)
    refused(AssertionError, "tensor model parallel group is not initialized", ps.get_tp_group)
    refused(AssertionError, "not initialized", ps.get_topology)
    assert not ps.model_parallel_is_initialized() and ps.find_group("tp") is None
    refused(ValueError, "is not a multiple of", lambda: ps.initialize_model_parallel(world_size + 1))
    refused(ValueError, "does not divide", lambda: ps.initialize_model_parallel(world_size, 1, 1, world_size + 1))
    assert not ps.model_parallel_is_initialized()
    ps.ensure_model_parallel_initialized(world_size, 1)
    assert ps.model_parallel_is_initialized()
    first = ps.get_tp_group()
    ps.ensure_model_parallel_initialized(world_size, 1)
    assert ps.get_tp_group() is first
    wrong = "tensor parallel group already initialized, but of unexpected size"
    refused(AssertionError, wrong, lambda: ps.ensure_model_parallel_initialized(1, world_size))
    refused(AssertionError, "data parallel", lambda: ps.ensure_model_parallel_initialized(world_size, 1, data_parallel_size=2))
    refused(AssertionError, "already initialized", lambda: ps.initialize_model_parallel(world_size))
    refused(AssertionError, "different world size", lambda: ps.init_distributed_environment(world_size + 1, rank))
    ps.init_distributed_environment(world_size, rank)
    refused(AssertionError, "EPLB group is not initialized", ps.get_eplb_group)
    ps.destroy_model_parallel()
    ps.destroy_model_parallel()
    assert not ps.model_parallel_is_initialized()
    refused(ValueError, "is destroyed", lambda: torch.ops.lockstep.all_reduce(torch.ones(1), first.unique_name))
    ps.initialize_model_parallel(world_size, enable_expert_parallel=False)
    refused(AssertionError, "expert parallel group is not initialized", ps.get_ep_group)
    assert ParallelGroups.current().ep is None
    assert ps.get_tp_group().all_reduce(torch.ones(1)).item() == world_size
    ps.destroy_model_parallel()


def open_things() -> tuple[int, int]:
    """(sockets, other descriptors) of this process."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    sockets = sum(link.startswith("socket:") for link in links)
    return sockets, len(links) - sockets


def settled() -> tuple[int, int]:
    """`open_things` once it has not changed for a while: gloo closes its sockets on a thread of its own."""
    seen = [open_things()]
    while (len(seen) < 20 and len(set(seen[-4:])) > 1) or len(seen) < 4:
        time.sleep(0.1)
        seen.append(open_things())
    return seen[-1]


def again(rank: int, world_size: int, folder: str) -> list[Any]:
    """init -> destroy -> init, three times over; nothing is left in between."""
    counts = []
    for turn in range(3):
        ps.init_distributed_environment(world_size, rank, f"file://{folder}/{turn}", backend="gloo", timeout=30)
        ps.initialize_model_parallel(world_size)
        tp = ps.get_tp_group()
        tp.make_sibling_device_group()
        assert tp.all_reduce(torch.ones(1)).item() == world_size
        tp.barrier()
        ps.cleanup_dist_env_and_memory()
        assert not dist.is_initialized() and ps.find_group("world") is None
        assert "GLOO_SOCKET_IFNAME" not in os.environ
        counts.append(settled())
    return counts


def names(rank: int, world_size: int) -> None:
    """communication_op, patching, capture and flags."""
    x = torch.ones(2, 2 * world_size) * (rank + 1)
    total = world_size * (world_size + 1) / 2
    ps.initialize_model_parallel(world_size)
    assert (collectives.tensor_model_parallel_all_reduce(x) == total).all()
    assert collectives.tensor_model_parallel_all_gather(x).shape == (2, 2 * world_size**2)
    assert collectives.tensor_model_parallel_all_gather(x, 0).shape == (2 * world_size, 2 * world_size)
    scattered = collectives.tensor_model_parallel_reduce_scatter(x)
    assert scattered.shape == (2, 2) and (scattered == total).all()
    found = collectives.tensor_model_parallel_gather(x, dst=1, dim=0)
    assert (found is None) == (rank != 1)
    got = collectives.broadcast_tensor_dict({"x": x, "n": 1} if rank == 1 else None, src=1)
    assert got is not None and got["n"] == 1 and (got["x"] == 2).all()
    own = ps.get_tp_group()
    other = ps.init_model_parallel_group([[r] for r in range(world_size)], rank, "gloo", group_name="draft")
    with ps.patch_tensor_parallel_group(other):
        assert ps.get_tp_group() is other and ps.get_tensor_model_parallel_world_size() == 1

        def nested() -> None:
            with ps.patch_tensor_parallel_group(own):
                pass

        refused(AssertionError, "already patched", nested)
    assert ps.get_tp_group() is own
    with ps.graph_capture(torch.device("cpu")) as context:
        assert context.stream is None
        assert (own.all_reduce(x) == total).all()
    assert ps.custom_all_reduce_enabled()
    ps.set_custom_all_reduce(False)
    assert not ps.custom_all_reduce_enabled()
    ps.set_custom_all_reduce(True)


def foreign(rank: int, world_size: int, folder: str) -> None:
    """torch's default group made by somebody else is checked, used, and left alone at the end."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/foreign", rank=rank, world_size=world_size)
    refused(
        ValueError,
        f'init_process_group("gloo", world_size={world_size + 1}, rank=...)',
        lambda: ps.init_distributed_environment(world_size + 1, rank, backend="gloo"),
    )
    refused(ValueError, "init_process_group", lambda: ps.init_distributed_environment(world_size, (rank + 1) % world_size, backend="gloo"))
    ps.init_distributed_environment(backend="gloo")
    ps.initialize_model_parallel(world_size)
    assert ps.get_world_group().local_rank == rank
    assert ps.get_tp_group().all_reduce(torch.ones(1)).item() == world_size
    ps.cleanup_dist_env_and_memory()
    assert dist.is_initialized()
    x = torch.ones(1)
    dist.all_reduce(x)
    assert x.item() == world_size
    gc.collect()
    assert not process_groups._DEVICES and (sys.platform != "linux" or _loops() == 1)  # theirs
    dist.destroy_process_group()


def unusable(rank: int, world_size: int) -> None:
    """A default group whose backend moves no data is refused with the call to make instead."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    refused(ValueError, 'call init_process_group("gloo") instead', lambda: ps.init_distributed_environment(backend="gloo"))
    dist.destroy_process_group()


def nodes(rank: int, world_size: int) -> Any:
    group = ps.get_world_group().cpu_group
    assert ps.get_node_count() == 1
    return [ps.in_the_same_node_as(group, source) for source in range(world_size)]


def two_hosts(rank: int, world_size: int) -> Any:
    """Ranks 0 and 2 on one host, 1 and 3 on another: shared memory told apart by folder."""
    import tempfile

    from lockstep.distributed import nodes as module

    folder = tempfile.gettempdir() if rank % 2 else "/dev/shm"
    module.shared_files.folder = lambda: folder  # type: ignore[attr-defined]
    holds = module._holds
    module._holds = lambda path, token: path.startswith(folder + "/lockstep") and holds(path, token)
    group = ps.get_world_group().cpu_group
    return module.in_the_same_node_as(group, 1), module._node_count(group)


def listening(rank: int, world_size: int) -> list[str]:
    """Addresses of every socket this process listens on, after all groups were made and used."""
    ps.initialize_model_parallel(world_size, enable_eplb=True)
    for getter in GETTERS.values():
        getter().all_reduce(torch.ones(1))
    ps.get_tp_group().make_sibling_device_group()
    inodes = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(f"/proc/self/fd/{name}").removeprefix("socket:[").removesuffix("]"))
    found = []
    for table in ("tcp", "tcp6"):
        with open(f"/proc/self/net/{table}") as file:
            for line in file.readlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    found.append(fields[1].split(":")[0])
    ps.get_world_group().barrier()
    return found


def methods(rank: int, world_size: int, url: str, backend: str) -> float:
    ps.init_distributed_environment(world_size, rank, url, backend=backend, timeout=timedelta(seconds=30))
    total = ps.get_world_group().all_reduce(torch.ones(1)).item()
    ps.get_world_group().barrier()
    ps.cleanup_dist_env_and_memory()
    return total


def from_environment(rank: int, world_size: int) -> Any:
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)})
    ps.init_distributed_environment(backend="gloo", timeout=30)
    world = ps.get_world_group()
    found = world.rank, world.world_size, world.local_rank, world.all_reduce(torch.ones(1)).item()
    world.barrier()
    ps.cleanup_dist_env_and_memory()
    return found


def users_interface(rank: int, world_size: int) -> str:
    """A user's own choice of interface stays."""
    assert choose_interface("127.0.0.1") == "lo" and env.bind_collectives("lo") in (["NCCL_SOCKET_IFNAME"], [])
    return os.environ["GLOO_SOCKET_IFNAME"]


def layout_checked(rank: int, world_size: int, sizes: dict[str, int]) -> None:
    assert layout(rank, world_size, sizes)["suffix"] == f"dp0_pp0_pcp0_tp{rank}_dcp0_ep{rank}_rank{rank}"


def nodes_checked(rank: int, world_size: int) -> None:
    assert nodes(rank, world_size) == [[True] * world_size] * world_size


def split(rank: int, world_size: int) -> None:
    """Where NCCL can be split, all device groups of an axis come from one call; CPU groups are made one by one."""
    from lockstep.distributed import process_groups

    calls: list[Any] = []

    def split_group(split_ranks: Any, timeout: Any, group_desc: str, backend: str = "") -> Any:
        """In place of NCCL, which this machine has not: gloo's groups, in the order of the lists."""
        calls.append((split_ranks, backend))
        made = [dist.new_group(ranks, backend="gloo") for ranks in split_ranks]
        return next(group for group, ranks in zip(made, split_ranks, strict=True) if rank in ranks)

    before = dist.split_group, process_groups.can_split
    dist.split_group, process_groups.can_split = split_group, lambda: True  # type: ignore[assignment]
    try:
        found = process_groups.make_subgroup([[0, 2], [1, 3]], rank, "nccl", None, "x")
        assert dist.get_process_group_ranks(found) == [rank % 2, rank % 2 + 2]
        assert calls == [([[0, 2], [1, 3]], "cuda:nccl" if process_groups._CAN_FILTER else "")]
        process_groups.make_subgroup([[0, 1], [2, 3]], rank, "gloo", None, "y")
        assert len(calls) == 1
    finally:
        dist.split_group, process_groups.can_split = before  # type: ignore[assignment]


def bound(rank: int, world_size: int) -> None:
    """A default group bound to a device that cannot be split: groups are made one by one, with the binding aside."""
    from lockstep.distributed import process_groups

    world: Any = dist.group.WORLD
    world.bound_device_id = torch.device("cuda", rank)
    assert process_groups.is_device_bound() and not process_groups.can_split()
    seen: list[Any] = []
    new_group = dist.new_group

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(world.bound_device_id)
        return new_group(*args, **kwargs)

    dist.new_group = spy
    try:
        ps.initialize_model_parallel(2, enable_expert_parallel=False)
        assert ps.get_pp_group().cpu_group is not None
    finally:
        dist.new_group = new_group
    assert seen and set(seen) == {None}
    assert world.bound_device_id == torch.device("cuda", rank)
    world.bound_device_id = None
    assert ps.get_tp_group().all_reduce(torch.ones(1)).item() == 2
