"""A worker's way into the groups, and out again. Imports torch: only worker processes that need groups import this."""

from __future__ import annotations

from lockstep.distributed import ledger, observer, parallel_state, rendezvous
from lockstep.distributed.groups import ParallelGroups
from lockstep.distributed.progress import ProgressCell
from lockstep.executor.wire import Launch


def join(launch: Launch, cell: ProgressCell) -> ParallelGroups:
    """Meet the other ranks, make every axis's group, and count collectives in the progress cell from here on."""
    parallel = launch.config.parallel
    observer.add(lambda number, what: cell.enter_collective(what))
    rendezvous.join(
        launch.rank,
        launch.world_size,
        launch.local_rank,
        *launch.rendezvous,
        listen_fd=launch.listen_fd if launch.rank == 0 else None,
        backend="nccl" if launch.config.runtime.device == "cuda" else "gloo",
        timeout_s=parallel.distributed_timeout_seconds,
    )
    parallel_state.initialize_model_parallel(
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.prefill_context_parallel_size,
        parallel.decode_context_parallel_size,
        enable_expert_parallel=parallel.enable_expert_parallel,
    )
    if parallel.check_collectives:
        ledger.enable()
    return ParallelGroups.current()


def leave() -> None:
    """Release the groups."""
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()
