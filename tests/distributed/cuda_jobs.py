"""Functions that the CUDA group tests run on ranks."""

from __future__ import annotations

import torch

from lockstep.distributed import parallel_state as ps
from lockstep.distributed import process_groups
from lockstep.distributed.communicators.nccl import NcclCommunicator
from lockstep.distributed.group import GroupCoordinator
from lockstep.utils.net import Listener
from tests.distributed.group_jobs import equal, refused, sample_dict


def world(rank: int, world_size: int) -> str:
    """The default group is bound and can be split; collectives, capture and tensor dicts on devices."""
    assert process_groups.can_split()
    ps.initialize_model_parallel(world_size)
    tp = ps.get_tp_group()
    assert tp.device == torch.device("cuda", rank)
    x = torch.full((4,), rank + 1.0, device=tp.device)
    total = world_size * (world_size + 1) / 2
    assert (tp.all_reduce(x) == total).all()
    with ps.graph_capture(tp.device) as context:
        assert context.stream is not None
        graph, out = torch.cuda.CUDAGraph(), torch.zeros(4, device=tp.device)
        with torch.cuda.graph(graph, stream=context.stream):
            out.copy_(tp.all_reduce(x) * 2)
    graph.replay()
    torch.cuda.synchronize()
    assert (out == 2 * total).all()
    # Groups of any shape can be made off the default group, the CPU's and the GPU's in one.
    group = process_groups.make_subgroup([list(range(world_size))], rank, "nccl", None, "test")
    NcclCommunicator(group, tp.device).all_reduce_(x)
    assert (x == total).all()
    if world_size > 1:
        given = {"gpu": torch.ones(3, 4, device=tp.device).t(), "cpu": torch.ones(2), "n": 1}
        handles = tp.isend_tensor_dict(given)
        got = tp.recv_tensor_dict()
        for handle in handles:
            handle.wait()
        assert (
            got is not None
            and got["gpu"].device == tp.device
            and got["cpu"].device.type == "cpu"
            and equal(got["gpu"].cpu(), given["gpu"].cpu())
        )
        assert torch.equal(
            tp.reduce_scatter(torch.ones(world_size, 2, device=tp.device), 0), torch.full((1, 2), float(world_size), device=tp.device)
        )
    tp.barrier()
    return "passed"


def shared(rank: int, world_size: int) -> str:
    """Several ranks on one GPU: gloo through host memory."""
    device = torch.device("cuda", 0)
    group = GroupCoordinator([list(range(world_size))], rank, "gloo", group_name="shared", device=device)
    x = torch.full((3, 2), rank + 1.0, device=device)
    total = world_size * (world_size + 1) / 2
    assert (group.all_reduce(x) == total).all() and group.all_gather(x, 0).shape == (3 * world_size, 2)
    given = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in sample_dict().items()}
    handles = group.isend_tensor_dict(given)
    got = group.recv_tensor_dict()
    for handle in handles:
        handle.wait()
    assert got is not None and got["hidden"].device == device
    assert equal(got["hidden"].cpu(), sample_dict()["hidden"]) and equal(got["inner"], sample_dict()["inner"])
    assert group.recv((2,), torch.float32, 0).tolist() == [7.0, 7.0] if rank == 1 else True
    if rank == 0:
        group.send(torch.full((2,), 7.0, device=device), 1)
    group.destroy()
    return "passed"


def too_many(rank: int, world_size: int) -> None:
    with Listener() as listener:
        url = f"tcp://127.0.0.1:{listener.port}"
    count = torch.cuda.device_count()
    refused(ValueError, f"local rank {count} needs", lambda: ps.init_distributed_environment(1, 0, url, count, "nccl"))
