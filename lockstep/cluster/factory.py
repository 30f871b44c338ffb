"""Which client a configuration asks for."""

from __future__ import annotations

from pathlib import Path

from lockstep.cluster.contract import EngineClient
from lockstep.cluster.local import LocalClient
from lockstep.config.defaults import default_backend
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.engine.core import EngineCore
from lockstep.executor.factory import make_executor


def make_supervised(config: EngineConfig, spec: ModelSpec, folder: Path, *, replaced: bool = False) -> EngineClient:
    """As `make_client`, and even a single replica is a process of its own, which is started again when it dies.

    But for a replica whose ranks others placed: Ray, or a launcher. replaced: this process is followed by another when it fails,
    already while it starts.
    """
    if default_backend(config.parallel) in ("uni", "mp"):
        from lockstep.cluster.router import DataParallelClient

        return DataParallelClient(config, spec, folder, replaced=replaced)
    return make_client(config, spec, folder)


def make_client(config: EngineConfig, spec: ModelSpec, folder: Path) -> EngineClient:
    """An engine in this process, or a router over replicas, started and ready.

    Raises ConfigError when the model does not fit, ExecutorError when a rank does not start.
    """
    if config.parallel.replicas_served > 1:
        from lockstep.cluster.router import DataParallelClient

        return DataParallelClient(config, spec, folder)
    executor = make_executor(config, spec, folder)
    try:
        return LocalClient(EngineCore(config, spec, executor))
    except Exception as e:
        executor.give_up(e)
        raise
    except BaseException:
        executor.shutdown()
        raise
