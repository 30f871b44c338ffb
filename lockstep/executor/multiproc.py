"""One worker process per rank, in lockstep: every order goes to all ranks, through one message queue on each host.

The driver never imports torch. A step costs the engine one copy into shared memory; the next step can be handed over
while the ranks run this one. What can go wrong, and who notices, is in `fleet.py`.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec

from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.executor import affinity, wire
from lockstep.executor.contract import Executor, ExecutorError, RankMemory, StepFuture
from lockstep.executor.fleet import Fleet
from lockstep.executor.gather import Door
from lockstep.executor.operations import Operation, StepOperation
from lockstep.executor.spawn import Plan
from lockstep.observability.timeline import Timeline
from lockstep.observability.trace import BROADCAST
from lockstep.protocol import RankLive, StepPlan
from lockstep.protocol.health import RankHealth


class MultiprocExecutor(Executor):
    """See `Executor`. The output rank is the first tensor-parallel rank of the last pipeline stage."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, folder: Path, *, worker_cls: str, again: bool = False) -> None:
        """Starts all ranks; returns when their models are loaded. Raises ExecutorError when one does not get there.

        again: also when they do not get ready, this process is followed by another that starts them anew: other hosts are told to
        wait for it. Else `say_again` tells them, once that is so.
        """
        self.timeline = Timeline()
        parallel = config.parallel
        # One for each stage, and one that waits for the first: the ranks never wait for the engine.
        stages = parallel.pipeline_parallel_size
        self.max_concurrent_batches = stages + 1 if config.scheduler.async_scheduling else stages
        self._step_limit_s = parallel.execute_model_timeout_seconds
        self._fleet = self._make_fleet(Plan(config, spec, Path(folder), worker_cls, again=again))
        self._finalizer = weakref.finalize(self, self._fleet.stop)  # also at exit
        try:
            self._fleet.start()
        except BaseException:  # also Ctrl-C while waiting
            self._fleet.stop()
            raise

    def _make_fleet(self, plan: Plan) -> Fleet:
        """The ranks to be started."""
        parallel = plan.config.parallel
        if parallel.nodes_per_replica == 1:
            return Fleet(plan, affinity.plan_here(len(plan.ranks), parallel))
        if parallel.node_rank not in parallel.group:
            return Fleet(replace(plan, leads_only=True), [], Door(parallel))
        return Fleet(plan, affinity.plan_here(len(plan.ranks), parallel), Door(parallel))

    def memory(self) -> list[RankMemory]:
        return msgspec.convert(self.collective_rpc("memory"), list[RankMemory])

    def initialize_kv_cache(self, num_blocks: int) -> None:
        self.collective_rpc("initialize_kv_cache", (num_blocks,))

    def execute_model(self, plan: StepPlan) -> StepFuture:
        operation = self._open(StepOperation, f"step {plan.step}", [self._fleet.plan.output_rank], self._step_limit_s)
        cast(StepOperation, operation).results = self._fleet.results
        with self.timeline.span(BROADCAST, "engine", plan.step):
            self._give(operation, wire.Step(operation.id, plan), self._step_limit_s)
        return cast(StepOperation, operation)

    def collective_rpc(
        self, method: str, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None, timeout: float | None = None
    ) -> list[Any]:
        if method.startswith("_"):
            raise ValueError(f"method={method!r} is private to the worker: call a public one.")
        deadline = None if timeout is None else time.monotonic() + timeout
        limit = max(self._step_limit_s, timeout or 0.0)
        operation = self._open(Operation, f"call {method}", range(self._fleet.plan.world_size), limit)
        self._give(operation, wire.Call(operation.id, method, list(args), dict(kwargs or {})), limit if timeout is None else timeout)
        operation.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return [operation.values[rank] for rank in sorted(operation.values)]

    def health(self) -> list[RankHealth]:
        return self._fleet.health()

    def live(self) -> list[RankLive]:
        try:
            return [self._fleet.board.live(rank) for rank in range(self._fleet.plan.world_size)]
        except (ValueError, IndexError):  # the board was closed: the ranks have ended
            return []

    def check_health(self) -> None:
        if self._fleet.operations.error is not None:
            raise self._fleet.operations.error

    def register_failure_callback(self, callback: Callable[[ExecutorError], None]) -> None:
        self._fleet.on_failure(callback)

    def say_again(self) -> None:
        self._fleet.say_again()

    def give_up(self, error: Exception) -> None:
        words = str(error).partition("\n")[0]
        self._fleet.why = words if words and isinstance(error, ConfigError | ExecutorError) else f"{type(error).__name__}: {words}"
        self.shutdown()

    def shutdown(self) -> None:
        self._fleet.stop()

    def _open(self, make: type[Operation], what: str, ranks: Sequence[int], limit_s: float) -> Operation:
        return self._fleet.operations.open(make, what, ranks, limit_s)

    def _give(self, operation: Operation, order: wire.Order, timeout: float) -> None:
        try:
            self._fleet.send(order, timeout)
        except BaseException:
            self._fleet.operations.drop(operation)
            raise
