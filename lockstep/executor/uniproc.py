"""One rank, in this process: the shortest way from a plan to its result, and no group to lose step with."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.distributed.rank_times import RankTimes
from lockstep.executor import failure, wire
from lockstep.executor.affinity import plan_here
from lockstep.executor.contract import ExecutorError, StepFuture
from lockstep.executor.in_process import InProcessExecutor
from lockstep.executor.worker_loop import call_worker, leave, raised_answer, worker_class
from lockstep.observability.timeline import Timeline
from lockstep.protocol import RankLive, StepPlan, StepResult
from lockstep.protocol.health import RankHealth
from lockstep.utils.host_memory import resident_bytes


class _Finished:
    """The future of a step that has run."""

    def __init__(self, result: StepResult | None, error: ExecutorError | None) -> None:
        self._result, self._error = result, error

    def done(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> StepResult:
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result


class UniprocExecutor(InProcessExecutor):
    """See `Executor`. Steps and calls run on the caller's thread; their timeouts do not interrupt them.

    The process is the user's: it is not bound to cores. The kernels' own threads are, and the caller while a step runs.
    """

    max_concurrent_batches = 1

    def __init__(self, config: EngineConfig, spec: ModelSpec, folder: Path, *, worker_cls: str) -> None:
        super().__init__()
        self._times = RankTimes()
        self._times.is_process(os.getpid())
        self._place = ("init", time.monotonic())  # what the rank is at, and since when
        self._seat: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        with self._ending("init"):
            cls = worker_class(worker_cls)
            (share,) = plan_here(1, config.parallel)
            groups = None
            if getattr(cls, "needs_distributed", True):
                from lockstep.distributed.groups import ParallelGroups
                from lockstep.kernels.threads import Seat

                groups = ParallelGroups.solo()
                if config.runtime.device == "cpu":
                    self._seat = Seat(share)
            self._worker = cls(config, spec, Path(folder), 0, config.parallel.first_device, groups, None)
            self._worker.init_device(share)
        with self._ending("load"):
            self._worker.load_model()

    def execute_model(self, plan: StepPlan) -> StepFuture:
        self.check_health()
        try:
            with self._ending(f"step {plan.step}"), self._seat, self.timeline.span("run step", "engine", plan.step):
                timeline: Timeline = self._worker.timeline
                timeline.enter(plan.step)
                began_ns = time.monotonic_ns()
                result = self._worker.execute_model(plan)
                self._times.stepped(time.monotonic_ns() - began_ns)
                leave(timeline, plan, "result")
                return _Finished(result, None)
        except ExecutorError as e:
            return _Finished(None, e)

    def collective_rpc(
        self, method: str, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None, timeout: float | None = None
    ) -> list[Any]:
        answer = call_worker(self._worker, self._call(0, method, args, kwargs))
        if isinstance(answer, wire.Raised):
            raise failure.raised(0, answer)
        return [wire.decode_value(answer.value)]

    def health(self) -> list[RankHealth]:
        phase, since_s = self._place
        return [RankHealth(rank=0, pid=os.getpid(), where=phase, phase=phase, age_s=time.monotonic() - since_s)]

    def live(self) -> list[RankLive]:
        self._times.memory(resident_bytes())
        return [self._times.live(0, phase=self._place[0], beat_age_s=0.0)]  # who asks is in the rank's own process

    @contextlib.contextmanager
    def _ending(self, phase: str) -> Iterator[None]:
        """An exception inside ends the executor, as an ExecutorError that the exception is the cause of."""
        self._place = (phase, time.monotonic())
        try:
            yield
            self._place = ("idle", time.monotonic())
        except Exception as e:
            error = failure.raised(0, raised_answer(0, phase, e, fatal=True))
            error.ranks = self.health()
            self._break(error)
            raise error from e
