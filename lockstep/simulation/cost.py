"""What a step costs: the interface between the scheduler's plans and any model of the ranks' speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lockstep.protocol import StepPlan


@dataclass(frozen=True)
class StepWork:
    """What a plan asks of the ranks. Row i computes `queries[i]` tokens, the last of the `contexts[i]` that it holds afterwards."""

    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    sampled: int  # rows that yield a token

    @classmethod
    def of(cls, plan: StepPlan) -> StepWork:
        """The work of `plan`."""
        ends = (start + count for start, count in zip(plan.num_computed, plan.num_tokens, strict=True))
        return cls(tuple(plan.num_tokens), tuple(ends), sum(plan.samples))

    @property
    def rows(self) -> int:
        """Requests in the step."""
        return len(self.queries)

    @property
    def tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(self.queries)


class StepCost(Protocol):
    """Seconds of a step's parts. Pure: the same work always costs the same."""

    def stage_s(self, work: StepWork) -> Sequence[float]:
        """What each pipeline stage computes, in stage order; one number without a pipeline."""
        ...

    def hop_s(self, work: StepWork) -> float:
        """From the end of one stage to when the next has what it needs."""
        ...

    def driver_s(self, work: StepWork) -> float:
        """What the engine's own thread adds that nothing overlaps: planning, handing out, taking in."""
        ...


@dataclass(frozen=True)
class FunctionCost:
    """A cost from plain functions: `step` gives the seconds of the whole step, which `stages` share evenly."""

    step: Callable[[StepWork], float]
    stages: int = 1
    hop: float = 0.0
    driver: float = 0.0

    def stage_s(self, work: StepWork) -> Sequence[float]:
        return [self.step(work) / self.stages] * self.stages

    def hop_s(self, work: StepWork) -> float:
        del work
        return self.hop

    def driver_s(self, work: StepWork) -> float:
        del work
        return self.driver
