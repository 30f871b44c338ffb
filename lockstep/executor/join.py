"""A worker's way into the groups, and out again. Imports torch: only worker processes that need groups import this."""

from __future__ import annotations

from lockstep.config.errors import ConfigError
from lockstep.config.launcher import Place
from lockstep.config.tree import EngineConfig, ParallelConfig
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
        parallel.first_device + launch.local_rank,
        *launch.rendezvous,
        listen_fd=launch.listen_fd if launch.rank == 0 else None,
        backend="nccl" if launch.config.runtime.device == "cuda" else "gloo",
        timeout_s=parallel.distributed_timeout_seconds,
    )
    _make_groups(parallel)
    return ParallelGroups.current()


def _make_groups(parallel: ParallelConfig, replicas: int = 1) -> None:
    parallel_state.initialize_model_parallel(
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.prefill_context_parallel_size,
        parallel.decode_context_parallel_size,
        enable_expert_parallel=parallel.enable_expert_parallel,
        data_parallel_size=replicas,
    )
    if parallel.check_collectives:
        ledger.enable()


def leave() -> None:
    """Release the groups."""
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


class Membership:
    """This process's part in the groups of all that a launcher started: one executor at a time holds it.

    What the user's program made (torch's default group, the world group, even the model-parallel groups) is used if its sizes
    are right, and left alone at the end. `lives` counts the memberships of this process, alike on every rank.
    """

    lives = 0
    _held = False

    def __init__(self, config: EngineConfig, place: Place) -> None:
        """Meet the other ranks. Collective over all of them. Raises ConfigError where another LLM of this process is still there."""
        parallel = config.parallel
        if Membership._held:
            raise ConfigError(
                "another LLM of this process has the launcher's ranks: "
                "call its shutdown() (or leave its `with` block) before making a new one."
            )
        self._ours = [parallel_state.find_group("world") is None, not parallel_state.model_parallel_is_initialized()]
        Membership._held, self._open = True, True
        Membership.lives += 1
        try:
            parallel_state.init_distributed_environment(
                place.world_size,
                place.rank,
                local_rank=place.local_rank,
                backend="nccl" if config.runtime.device == "cuda" else "gloo",
                timeout=parallel.distributed_timeout_seconds,
            )
            if self._ours[1]:
                _make_groups(parallel, parallel.data_parallel_size)
            else:
                _check_groups(parallel)
            self.groups = ParallelGroups.current()
        except BaseException:
            self.leave()
            raise

    @property
    def spared(self) -> tuple[str, ...]:
        """The groups (of `ParallelGroups`) that must outlive this executor's failure: the user's world."""
        return () if self._ours[0] else ("world",)

    def leave(self) -> None:
        """Release what was made here. Not collective; may be called twice."""
        if not self._open:
            return
        Membership._held, self._open = False, False
        if self._ours[1]:
            ledger.disable()
            parallel_state.destroy_model_parallel()
        if self._ours[0]:
            parallel_state.destroy_distributed_environment()


def _check_groups(parallel: ParallelConfig) -> None:
    try:
        parallel_state.ensure_model_parallel_initialized(
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
            parallel.prefill_context_parallel_size,
            parallel.decode_context_parallel_size,
            data_parallel_size=parallel.data_parallel_size,
        )
    except AssertionError as e:
        raise ConfigError(f"{e}: ask for the sizes that initialize_model_parallel() was given, or let the LLM make the groups.") from None
