"""`distributed_executor_backend="ray"`: the ranks of other hosts as in `multiproc`, their agents started by Ray.

1. A placement group: one bundle for each pipeline stage, with the CPUs or GPUs of its ranks. A bundle is on one node, so the
   ranks that share each layer are; stages are spread over nodes.
2. One actor in each bundle runs the agent of a node (`node_agent`): node n has the ranks of stage n. This process has none.
3. The agents report at a port of this process that the system chose, with a key drawn for this executor.

From there on Ray has no part: orders, answers and deaths go over the agents' own connections. All that is handed to Ray is
bytes that msgspec encoded.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from lockstep.config.errors import ConfigError
from lockstep.config.hf import load_spec
from lockstep.config.model_spec import ModelSpec
from lockstep.config.source import find_folder
from lockstep.config.tree import EngineConfig, ParallelConfig
from lockstep.distributed.progress import rank_list
from lockstep.executor.contract import ExecutorError
from lockstep.executor.factory import serve_node
from lockstep.executor.fleet import Fleet
from lockstep.executor.gather import Door
from lockstep.executor.multiproc import MultiprocExecutor
from lockstep.executor.ray_actors import Troupe
from lockstep.executor.spawn import Plan
from lockstep.observability import logging

PATIENCE_S = 5.0  # after so long without room in the cluster it is said what is waited for
EXPLAIN_S = 1.0  # how long to wait for what Ray knows about an actor that is gone
LINGER_S = 10.0  # after so long an actor whose agent has ended goes: cut off, it cannot be told to
_log = logging.get_logger(__name__)


class RayExecutor(MultiprocExecutor):
    """See `Executor`, and `MultiprocExecutor`, of which this is the leader without ranks."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, folder: Path, *, worker_cls: str) -> None:
        """Raises ConfigError when no cluster can be used, ExecutorError when it has no room or a rank does not get ready."""
        self._stage = _Stage()
        try:
            super().__init__(config, spec, Path(folder).resolve(), worker_cls=worker_cls)
        except BaseException:
            self._stage.close()
            raise
        self._ender = weakref.finalize(self, _end, self._fleet, self._stage)

    def shutdown(self) -> None:
        self._ender()

    def _make_fleet(self, plan: Plan) -> Fleet:
        config, parallel = plan.config, plan.config.parallel
        kind = "GPU" if config.runtime.device == "cuda" else "CPU"
        address = self._stage.connect(parallel, kind)
        stages = parallel.pipeline_parallel_size
        self._stage.reserve(stages, kind, parallel.stage_size, config.runtime.startup_timeout_seconds)
        door = RayDoor(replace(parallel, nnodes=stages, node_rank=0, master_addr=address, master_port=0), self._stage)
        plan = replace(plan, config=replace(config, parallel=door.parallel), leads_only=True)
        fleet = Fleet(plan, [], door)
        try:
            self._stage.start(plan, door.key)
        except BaseException:
            door.listener.close()
            raise
        return fleet


def _end(fleet: Fleet, stage: _Stage) -> None:
    fleet.stop()
    stage.close()


class Launch(msgspec.Struct, kw_only=True):
    """What an actor is told. before, total: ranks of the same leader on its host, started by other actors, and all of them."""

    config: EngineConfig
    spec: ModelSpec
    folder: str
    worker_cls: str
    key: str
    before: int
    total: int


class AgentHost:
    """The Ray actor. Its process runs the agent; the ranks are that process's children, and end when it does."""

    def serve(self, launch: bytes) -> str:
        """Serve until it is over. Why it did not end in good order; "" when it did."""
        try:
            told = msgspec.msgpack.decode(launch, type=Launch)
            logging.configure(told.config.runtime.log_level)
            folder, spec = _model_here(told)
            place = (told.before, told.total)
            serve_node(told.config, spec, folder, worker_cls=told.worker_cls, key=told.key, place=place)
        except Exception as e:  # as text: the driver need not be able to make the exception again
            return str(e) if isinstance(e, ExecutorError | ConfigError) else f"{type(e).__name__}: {e}"
        finally:
            leave = threading.Timer(LINGER_S, os._exit, (0,))
            leave.daemon = True
            leave.start()
        return ""


def _model_here(told: Launch) -> tuple[Path, ModelSpec]:
    """The model as this host has it: where the leader has it, or else found by its name. The leader compares the numbers."""
    folder = Path(told.folder)
    if not folder.is_dir():
        folder = find_folder(told.config.model.model, told.config.model.revision)
    return folder, load_spec(folder) if (folder / "config.json").is_file() else told.spec


class RayDoor(Door):
    """The leader's door, where every node is one that Ray starts, node 0 too."""

    first = 0

    def __init__(self, parallel: ParallelConfig, stage: _Stage) -> None:
        """parallel.master_port: 0, the system's choice is in `self.parallel` then."""
        super().__init__(parallel, secrets.token_hex(32))
        self.parallel = replace(parallel, master_addr=self.address, master_port=self.listener.port)
        self.at = f"{self.address}:{self.listener.port}"
        self._stage = stage

    def watch(self) -> None:
        for number in self.expected:
            outcome = self._stage.outcome(number, 0.0)
            if outcome:
                what = f"node {number} of {self.parallel.nnodes}, which Ray was to start, did not: {outcome.rstrip('.')}."
                hint = " Install the same version of lockstep on every node of the cluster." if "No module named" in outcome else ""
                raise ExecutorError(what + hint, phase="node")

    def explain(self, number: int) -> str:
        outcome = self._stage.outcome(number, EXPLAIN_S)
        return f" ({outcome.rstrip('.')})" if outcome else ""

    def say_who_is_awaited(self, model: str | None, limit_s: float) -> None:
        """Nobody has to do anything: Ray starts them."""

    def advice(self, late: Sequence[int]) -> str:
        return (
            "see that the bundles of the placement group are free for the actors, that the nodes of the Ray cluster can connect to this "
            "host at any port, and that LOCKSTEP_HOST_IP, where it has several addresses, is the one that they reach"
        )


class _Stage:
    """What Ray holds for one executor: placement group and actors. Closing it leaves neither."""

    def __init__(self) -> None:
        self._troupe = Troupe()
        self._group: Any = None
        self._own_group = False
        self._bundles: list[int] = []  # by node: the bundle that it is in
        self._need: dict[str, float] = {}

    def connect(self, parallel: ParallelConfig, kind: str) -> str:
        """Join the cluster; this host's address as its nodes know it."""
        return self._troupe.join(parallel, kind)

    def reserve(self, stages: int, kind: str, ranks: int, limit_s: float) -> None:
        """Room for `ranks` ranks of each stage. Raises ExecutorError saying what was asked for and what there is."""
        from ray.util import get_current_placement_group, placement_group

        self._need, self._bundles = {kind: float(ranks)}, list(range(stages))
        self._group = get_current_placement_group()
        if self._group is not None:
            self._bundles = fitting(self._group.bundle_specs, self._need, stages)
            return
        self._group, self._own_group = placement_group([self._need] * stages, strategy="SPREAD" if stages > 1 else "PACK"), True
        started = time.monotonic()
        said = False
        while not self._group.wait(min(0.5, limit_s)):
            waited = time.monotonic() - started
            if waited > limit_s:
                message = f"the Ray cluster had no room for the ranks in startup_timeout_seconds={limit_s:g}: {self._shortage()}"
                raise ExecutorError(message, phase="placement", kind="hung")
            if waited > PATIENCE_S and not said:
                said = True
                _log.warning("waiting for room in the Ray cluster: %s", self._shortage())

    def _shortage(self) -> str:
        import ray

        (kind, each), stages = next(iter(self._need.items())), len(self._bundles)
        nodes = sorted((n["NodeManagerAddress"], n["Resources"].get(kind, 0.0)) for n in ray.nodes() if n["Alive"])
        total, most = sum(count for _, count in nodes), max((count for _, count in nodes), default=0.0)
        runs = [rank_list(range(n * int(each), (n + 1) * int(each))) for n in self._bundles]
        asked = "; ".join(f"bundle {n} ({run}) {each:g} {kind}" for n, run in zip(self._bundles, runs, strict=True))
        there = ", ".join(f"{address} {count:g} {kind}" for address, count in nodes)
        text = (
            f"asked were {stages * each:g} {kind}, each bundle of one node ({asked}); its {len(nodes)} node(s) have "
            f"{total:g} {kind} ({there}), of which {ray.available_resources().get(kind, 0.0):g} are free. "
        )
        if most < each:
            return text + f"No node has {each:g}: use a tensor_parallel_size of at most {most:g}, or add larger nodes."
        return text + "Use fewer ranks, add nodes, or end what else runs there."

    def start(self, plan: Plan, key: str) -> None:
        """Start the actors, and have each run its node's agent."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        (kind, ranks), hosts = next(iter(self._need.items())), self._hosts()
        for number, bundle in enumerate(self._bundles):
            launch = Launch(
                config=replace(plan.config, parallel=replace(plan.config.parallel, node_rank=number)),
                spec=plan.spec,
                folder=str(plan.folder),
                worker_cls=plan.worker_cls,
                key=key,
                before=int(ranks) * hosts[:number].count(hosts[number]),
                total=int(ranks) * hosts.count(hosts[number]),
            )
            where = PlacementGroupSchedulingStrategy(self._group, bundle)
            options = {"max_restarts": 0, "scheduling_strategy": where}
            self._troupe.start(number, AgentHost, "serve", msgspec.msgpack.encode(launch), (kind, ranks), options)

    def _hosts(self) -> list[str]:
        """By node: Ray's name of the host that its bundle is on."""
        from ray.util import placement_group_table

        where = placement_group_table(self._group)["bundles_to_node_id"]
        return [str(where.get(bundle, bundle)) for bundle in self._bundles]

    def outcome(self, number: int, timeout_s: float) -> str:
        """What became of a node's agent, "" while Ray knows nothing of its end after `timeout_s`."""
        over = self._troupe.over([number], timeout_s)
        return over[number] or "it ended" if over else ""

    def close(self) -> None:
        """Leave nothing in the cluster, and leave it if it was joined here. Never raises; may be called twice."""
        self._troupe.close(self._remove_group)

    def _remove_group(self) -> None:
        if self._own_group:
            import ray

            ray.util.remove_placement_group(self._group)


def fitting(bundles: Sequence[Mapping[str, float]], need: Mapping[str, float], stages: int) -> list[int]:
    """The first bundles of an existing placement group that hold one stage each. Raises ConfigError when there are too few."""
    (kind, each) = next(iter(need.items()))
    found = [i for i, bundle in enumerate(bundles) if bundle.get(kind, 0.0) >= each]
    if len(found) < stages:
        there = ", ".join(f"{bundle.get(kind, 0.0):g} {kind}" for bundle in bundles)
        raise ConfigError(
            f"this program runs in a Ray placement group whose bundles have {there}, and {stages} of at least {each:g} {kind} are needed: "
            "one for each pipeline stage, because the ranks that share its layers must be on one node. Make the group so, or change "
            "tensor_parallel_size and pipeline_parallel_size."
        )
    return found[:stages]
