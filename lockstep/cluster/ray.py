"""`--data-parallel-backend ray`: replicas on the nodes of a Ray cluster, an actor each.

An actor keeps one replica for this process as a host that was started by hand would (`keeper`): it connects to the leader's
door, with a key drawn for this engine, and starts the replica's process, with its ranks, on its own node. From there on Ray has
no part; what becomes of the replica is the supervisor's to know, and an actor whose node dies is started elsewhere by Ray.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec

from lockstep.cluster.keeper import keep_replicas
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.config.source import find_folder
from lockstep.config.tree import EngineConfig
from lockstep.executor.contract import ExecutorError
from lockstep.executor.factory import join_ray
from lockstep.observability import logging
from lockstep.utils import env

LEAVE_S = 3.0  # how long keepers may take to leave by themselves


class Launch(msgspec.Struct, kw_only=True):
    """What an actor is told. config: of this replica's keeper."""

    config: EngineConfig
    spec: ModelSpec
    folder: str
    key: str


class ReplicaHost:
    """The Ray actor. Its process keeps one replica, whose processes end when it does."""

    def keep(self, launch: bytes) -> str:
        """Keep it until the leader ends. Why that was not in good order; "" when it was."""
        try:
            told = msgspec.msgpack.decode(launch, type=Launch)
            logging.configure(told.config.runtime.log_level)
            folder = Path(told.folder)
            if not folder.is_dir():  # another host may have it elsewhere; the leader compares what is in it
                folder = find_folder(told.config.model.model, told.config.model.revision)
            keep_replicas(told.config, told.spec, folder, key=told.key)
        except Exception as e:  # as text: the driver need not be able to make the exception again
            return str(e) if isinstance(e, ExecutorError | ConfigError) else f"{type(e).__name__}: {e}"
        return ""


class ReplicaActors:
    """The actors of one engine. Closing it leaves none."""

    def __init__(self, config: EngineConfig) -> None:
        """Join the cluster. Raises ConfigError when none can be used."""
        parallel = config.parallel
        self._owner = os.getpid()
        self._kind = "GPU" if config.runtime.device == "cuda" else "CPU"
        whole = replace(
            parallel, data_parallel_size=1, pipeline_parallel_size=parallel.pipeline_parallel_size * parallel.data_parallel_size
        )
        address, self._leave = join_ray(whole, self._kind)  # a cluster of our own has room for all
        self.key = secrets.token_hex(32)
        # No replica is this process's, and the door's port is the system's choice.
        here = replace(parallel, data_parallel_address=address, data_parallel_rpc_port=0, data_parallel_size_local=0)
        self.config = replace(config, parallel=here)
        self._actors: list[Any] = []
        self._ends: list[Any] = []  # by replica: what becomes of it
        self._open = True

    def start(self, spec: ModelSpec, folder: Path, port: int) -> None:
        """Start an actor for each replica, to connect to this process at `port`."""
        import ray

        parallel, runtime = self.config.parallel, self.config
        ranks = float(parallel.world_size)
        options: dict[str, Any] = {"num_cpus": ranks if self._kind == "CPU" else 0, "num_gpus": ranks if self._kind == "GPU" else 0}
        options |= {"max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": "SPREAD"}
        shared = env.for_other_hosts()
        if shared:
            options["runtime_env"] = {"env_vars": shared}
        actor = ray.remote(ReplicaHost)
        for replica in range(parallel.data_parallel_size):
            # Several may share a host, and nobody knows which: none keeps to cores, and each takes its share of the memory.
            mine = replace(
                parallel, data_parallel_rpc_port=port, data_parallel_size_local=1, data_parallel_start_rank=replica, cpu_binding=False
            )
            share = (runtime.cache.gpu_memory_utilization or 0.0) / parallel.data_parallel_size
            cache = runtime.cache if self._kind == "GPU" else replace(runtime.cache, gpu_memory_utilization=share or None)
            launch = Launch(config=replace(runtime, parallel=mine, cache=cache), spec=spec, folder=str(folder.resolve()), key=self.key)
            self._actors.append(actor.options(**options).remote())
            self._ends.append(self._actors[-1].keep.remote(msgspec.msgpack.encode(launch)))

    def words(self) -> str:
        """What Ray knows of actors that did not do: their ends, or that the cluster has no room; "" for nothing."""
        ray: Any = import_module("ray")
        found = []
        with contextlib.suppress(Exception):
            done, waiting = ray.wait(self._ends, num_returns=len(self._ends), timeout=0.2)
            for end in done:
                try:
                    found.append(str(ray.get(end, timeout=1.0)))
                except Exception as e:  # the actor is dead, or could not be made
                    found.append(str(e).strip().partition("\n")[0])
            if waiting:
                each, free = self.config.parallel.world_size, ray.available_resources().get(self._kind, 0.0)
                found.append(f"each replica takes {each} {self._kind} of one node, and the cluster has {free:g} free now")
        return "; ".join(words for words in found if words)

    def close(self) -> None:
        """End the actors, and leave the cluster if it was joined here. Never raises; may be called twice."""
        if not self._open or os.getpid() != self._owner:
            return
        self._open = False
        import ray

        with contextlib.suppress(Exception):  # the cluster may be gone, which is as good
            if ray.is_initialized():
                if self._ends:
                    ray.wait(self._ends, num_returns=len(self._ends), timeout=LEAVE_S)
                for actor in self._actors:
                    ray.kill(actor)
        leave: Callable[[], None] = self._leave
        with contextlib.suppress(Exception):
            leave()
