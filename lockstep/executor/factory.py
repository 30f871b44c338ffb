"""Which executor a configuration asks for. Torch-free: an executor is imported when it is made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.config.defaults import default_backend
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig, ParallelConfig
from lockstep.executor.contract import Executor
from lockstep.kernels.library import library

if TYPE_CHECKING:
    from lockstep.executor.ray_actors import Troupe

WORKER = "lockstep.worker.worker:Worker"


def serve_node(
    config: EngineConfig,
    spec: ModelSpec,
    folder: Path,
    *,
    worker_cls: str = WORKER,
    key: str | None = None,
    place: tuple[int, int] | None = None,
) -> None:
    """Run this host's ranks for the leader at master_addr, until that one ends in good order. Where they fail, or the leader does, and
    it had said that it comes again, it is looked for anew, as at the start.

    key, place: see NodeAgent. Raises ExecutorError when it ends otherwise, when it does not let this node in, and when it cannot
    be reached.
    """
    if config.runtime.device == "cpu":
        library()
    from lockstep.executor.node_agent import NodeAgent

    again = False
    while NodeAgent(config, spec, folder, worker_cls, key=key, place=place, again=again).run():
        again = True


def join_ray(parallel: ParallelConfig, kind: str) -> tuple[str, Troupe]:
    """Connect this process to a Ray cluster: (this host's address as its nodes know it, what starts actors and leaves again).

    parallel: the ranks that a cluster started here has to have room for. kind: CPU or GPU. Raises ConfigError when no cluster answers.
    """
    from lockstep.executor.ray_actors import Troupe

    troupe = Troupe()
    return troupe.join(parallel, kind), troupe


def make_executor(config: EngineConfig, spec: ModelSpec, folder: Path, *, worker_cls: str = WORKER, again: bool = False) -> Executor:
    """The executor for `config`, its ranks started and their models loaded.

    `worker_cls` ("module:Class") is what each rank runs. again: see MultiprocExecutor. Raises ConfigError for an unknown or
    unfitting backend, ExecutorError when a rank does not get ready.
    """
    if config.runtime.device == "cpu":
        library()  # compiled here if it must be, and missed here, rather than by every rank
    parallel = config.parallel
    world = parallel.world_size
    backend = default_backend(parallel)
    if backend == "uni":
        if world != 1:
            raise ConfigError(f"distributed_executor_backend='uni' runs one rank, and {world} are asked for: use 'mp'.")
        from lockstep.executor.uniproc import UniprocExecutor

        return UniprocExecutor(config, spec, folder, worker_cls=worker_cls)
    if backend == "mp":
        from lockstep.executor.multiproc import MultiprocExecutor

        return MultiprocExecutor(config, spec, folder, worker_cls=worker_cls, again=again)
    if backend == "external_launcher":
        from lockstep.executor.external import ExternalLauncherExecutor

        return ExternalLauncherExecutor(config, spec, folder, worker_cls=worker_cls)
    if backend == "ray":
        from lockstep.executor.ray import RayExecutor

        return RayExecutor(config, spec, folder, worker_cls=worker_cls)
    raise ConfigError(f"distributed_executor_backend={backend!r} is unknown: it must be 'uni', 'mp', 'ray' or 'external_launcher'.")
