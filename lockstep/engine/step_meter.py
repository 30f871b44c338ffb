"""What the engine notes of each of its steps: how large, how long, and how long it was expected to take. Some 5 us a step.

A step's seconds are what it adds to the wall clock: from when it was issued, or the one before it ended if that was later, to
its result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from lockstep.engine.stats import StepTotals
from lockstep.observability.predictor import StepPredictor
from lockstep.protocol import StepPlan


class StepMeter:
    """One engine's. One thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.totals = StepTotals.empty()
        self._predictor = StepPredictor()
        self._clock = clock
        self._ended_s = 0.0  # the last step

    def now(self) -> float:
        """For `done`, when a step is issued."""
        return self._clock()

    def left_s(self, plan: StepPlan, issued_s: float, early: float) -> float:
        """Seconds until that share of a step's expected time is left, for the oldest in flight; -inf when none is expected yet."""
        tokens = sum(plan.num_tokens)
        expected = self._predictor.predict(tokens, len(plan.slots), sum(plan.num_computed) + tokens)
        if expected is None:
            return -math.inf
        return max(issued_s, self._ended_s) + (1 - early) * expected - self._clock()

    def done(self, plan: StepPlan, issued_s: float) -> None:
        """A step's result is here."""
        now_s, totals = self._clock(), self.totals
        seconds = now_s - max(issued_s, self._ended_s)
        self._ended_s = now_s
        tokens, rows = sum(plan.num_tokens), len(plan.slots)
        context = sum(plan.num_computed) + tokens
        expected = self._predictor.predict(tokens, rows, context)
        self._predictor.learn(tokens, rows, context, seconds)
        totals.busy_s += seconds
        totals.tokens.observe(tokens)
        totals.seconds.observe(seconds)
        if expected is not None:
            totals.predicted_s += expected
            totals.measured_s += seconds
            totals.error_s += abs(expected - seconds)
            totals.predicted += 1
