"""`--data-parallel-backend ray`: replicas on the nodes of a Ray cluster, an actor each.

An actor keeps one replica for this process as a host that was started by hand would (`keeper`): it connects to the leader's
door, with a key drawn for this engine, and starts the replica's process, with its ranks, on its own node. From there on Ray has
no part; what becomes of the replica is the supervisor's to know. An actor whose node dies is started elsewhere by Ray; one that
ends by itself is replaced when its replica is due.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import msgspec

from lockstep.cluster.keeper import keep_replicas
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.config.source import find_folder
from lockstep.config.tree import EngineConfig
from lockstep.executor.contract import ExecutorError
from lockstep.executor.factory import join_ray
from lockstep.observability import logging


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
        self._kind = "GPU" if config.runtime.device == "cuda" else "CPU"
        whole = replace(
            parallel, data_parallel_size=1, pipeline_parallel_size=parallel.pipeline_parallel_size * parallel.data_parallel_size
        )
        address, self._troupe = join_ray(whole, self._kind)  # a cluster of our own has room for all
        self.key = secrets.token_hex(32)
        # No replica is this process's, and the door's port is the system's choice.
        here = replace(parallel, data_parallel_address=address, data_parallel_rpc_port=0, data_parallel_size_local=0)
        self.config = replace(config, parallel=here)
        self._told: dict[int, bytes] = {}  # by replica: what its actor is told
        self._ended: set[int] = set()  # replicas whose actor has ended

    def start(self, spec: ModelSpec, folder: Path, host: str, port: int) -> None:
        """Start an actor for each replica, to connect to this process's door."""
        config = self.config
        parallel, size = config.parallel, config.parallel.data_parallel_size
        for replica in range(size):
            # Several may share a host, and nobody knows which: none keeps to cores, and each takes its share of the memory.
            mine = replace(
                parallel,
                data_parallel_address=host,
                data_parallel_rpc_port=port,
                data_parallel_size_local=1,
                data_parallel_start_rank=replica,
                cpu_binding=False,
            )
            share = (config.cache.gpu_memory_utilization or 0.0) / size
            cache = config.cache if self._kind == "GPU" else replace(config.cache, gpu_memory_utilization=share or None)
            launch = Launch(config=replace(config, parallel=mine, cache=cache), spec=spec, folder=str(folder.resolve()), key=self.key)
            self._told[replica] = msgspec.msgpack.encode(launch)
            self._start(replica)

    def start_again(self, replica: int) -> None:
        """Start a new actor for a replica, if its last one has ended; one that lives comes by itself. Raises OSError when Ray cannot."""
        if replica in self._ended:
            try:
                self._start(replica)
            except Exception as e:
                raise OSError(f"Ray starts no actor for it: {e}") from None
            self._ended.discard(replica)

    def ended(self) -> dict[int, str]:
        """The replicas whose actors have ended since the last call, and why, in words."""
        over = self._troupe.over(replica for replica in self._told if replica not in self._ended)
        self._ended |= over.keys()
        return {replica: words.rstrip(". ") or "its actor ended" for replica, words in over.items()}

    def words(self, absent: Sequence[int]) -> str:
        """What Ray knows of the actors of replicas that have not reported."""
        with contextlib.suppress(Exception):  # the cluster may be gone
            pending = [replica for replica in self._troupe.pending() if replica in absent]
            if pending:
                each, free = self.config.parallel.world_size, import_module("ray").available_resources().get(self._kind, 0.0)
                return (
                    f"the cluster has no room for {len(pending)} of them: each replica takes {each} {self._kind} of one node, and {free:g} "
                    "are free in all; use fewer replicas, add nodes, or end what else runs there"
                )
            return (
                "their actors run; see that the nodes of the Ray cluster can connect to this host at any port, and that LOCKSTEP_HOST_IP, "
                "where it has several addresses, is the one that they reach"
            )
        return "no word of them"

    def close(self) -> None:
        """End the actors, and leave the cluster if it was joined here. Never raises; may be called twice."""
        self._troupe.close()

    def _start(self, replica: int) -> None:
        options = {"max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": "SPREAD"}
        room = (self._kind, float(self.config.parallel.world_size))
        self._troupe.start(replica, ReplicaHost, "keep", self._told[replica], room, options)
