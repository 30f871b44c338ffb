"""A calibrated machine as the cost of simulated steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.planner.cpu import CpuModel
from lockstep.simulation.cost import StepWork


@dataclass(frozen=True)
class CalibratedCost:
    """See `StepCost`. What the engine's thread does is part of the measured step, and not counted again."""

    model: CpuModel

    def stage_s(self, work: StepWork) -> Sequence[float]:
        return self.model.stage_s(work.queries, work.contexts, work.sampled)

    def hop_s(self, work: StepWork) -> float:
        return self.model.hop_s(work.tokens)

    def driver_s(self, work: StepWork) -> float:
        del work
        return 0.0
