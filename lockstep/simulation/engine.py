"""One simulated engine: the loop of `engine.core.EngineCore` under a virtual clock, its ranks replaced by a cost.

    issue steps until `depth` are in flight -> the oldest one's end -> its results -> issue ...

A step runs through the pipeline's stages one after the other; a stage takes steps in order, one at a time:

    begin[i] = max(end of the step before on stage i, end[i - 1] + hop)      end[i] = begin[i] + seconds of stage i
"""

from __future__ import annotations

from collections import deque

from lockstep.engine.plan_builder import ScheduledStep
from lockstep.engine.scheduler import Scheduler
from lockstep.protocol import EngineOutput, EngineRequest, StepResult
from lockstep.simulation.cost import StepCost, StepWork
from lockstep.simulation.report import ReplicaReport


class SimulatedEngine:
    """Drives the scheduler that it is handed. `wake_s`: when it next has something to do, None while it idles."""

    def __init__(self, scheduler: Scheduler, cost: StepCost, *, depth: int = 1) -> None:
        """depth: steps that may be in flight at once: one for each stage (or 2 of one stage). The one more that an executor may have waits
        for tokens before the first stage, which is not simulated: it begins when it would begin here."""
        assert depth >= 1, f"depth={depth}"
        self.scheduler, self.cost, self.depth = scheduler, cost, depth
        self.report = ReplicaReport()
        self.wake_s: float | None = None
        self._in_flight: deque[tuple[ScheduledStep, float]] = deque()  # oldest first, with when its result is there
        self._free_s: list[float] = []  # by stage: when it has done all that it was given

    def add(self, request: EngineRequest, now_s: float) -> None:
        """Queue a request. Raises RequestError when it can never run."""
        self.scheduler.add(request)
        if self.wake_s is None:
            self.wake_s = now_s
        self._observe(now_s)

    def advance(self, now_s: float) -> list[EngineOutput]:
        """It is `wake_s`: take the oldest result if it is there, and issue what may be issued. What came for requests."""
        if self._in_flight and self._in_flight[0][1] <= now_s:
            step, _ = self._in_flight.popleft()
            self.scheduler.update(step, StepResult(step=step.plan.step, tokens=[0] * len(step.sampled)))
        outputs = self.scheduler.take_outputs()
        issued_s = now_s
        while len(self._in_flight) < self.depth and (planned := self.scheduler.schedule()) is not None:
            issued_s = self._issue(planned, issued_s)
        self.wake_s = max(issued_s, self._in_flight[0][1]) if self._in_flight else None
        self._observe(now_s)
        return outputs

    def _issue(self, step: ScheduledStep, now_s: float) -> float:
        """Send a step through the stages; when the engine's thread is free again."""
        work = StepWork.of(step.plan)
        issued_s = at_s = now_s + self.cost.driver_s(work)
        hop_s, stages = self.cost.hop_s(work), self.cost.stage_s(work)
        if not self._free_s:
            self._free_s, self.report.stage_busy_s = [0.0] * len(stages), [0.0] * len(stages)
        assert self.depth <= max(2, len(stages)), f"depth={self.depth} for {len(stages)} stages"
        for stage, seconds in enumerate(stages):
            at_s = self._free_s[stage] = max(self._free_s[stage], at_s + (hop_s if stage else 0.0)) + seconds
            self.report.stage_busy_s[stage] += seconds
        self._in_flight.append((step, at_s))
        self.report.steps += 1
        return issued_s

    def _observe(self, now_s: float) -> None:
        stats = self.scheduler.stats()
        self.report.waiting.set(stats.waiting, now_s)
        self.report.running.set(stats.running, now_s)
        self.report.kv_usage.set(stats.kv_usage, now_s)
