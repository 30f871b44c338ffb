"""The constants of a serving engine, from measured TTFT and TPOT at some concurrencies: two for TPOT, three for TTFT.

TPOT(B) = step overhead + round(B) + interference * B / output_len * occupancy * stalls(B)
TTFT(B) = arrival + prefill_scale * prefill + beside(B) + queue * B * occupancy        (load.py has the words)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lockstep.planner.fit import mape, minimise
from lockstep.planner.load import Replica, Serving

LONGEST_TTFT_S = 3.0  # above it requests wait for KV blocks to become free, which no constant of a step explains


@dataclass(frozen=True)
class Run:
    """One measured run: `replica` predicts it, `concurrency` requests at a time."""

    replica: Replica
    concurrency: int
    ttft_s: float
    tpot_s: float

    def predicted_ttft_s(self, serving: Serving) -> float:
        return self.replica.with_serving(serving).at(self.concurrency).ttft_s

    def predicted_tpot_s(self, serving: Serving) -> float:
        return self.replica.with_serving(serving).at(self.concurrency).tpot_s


def steady(runs: Sequence[Run]) -> list[Run]:
    """Runs whose first tokens did not wait for memory: those TTFT is said of."""
    return [run for run in runs if run.ttft_s <= LONGEST_TTFT_S]


def tpot_error(runs: Sequence[Run], serving: Serving) -> float:
    """The mean error of TPOT, as a fraction."""
    return mape(lambda run: run.predicted_tpot_s(serving), runs, lambda run: run.tpot_s)


def ttft_error(runs: Sequence[Run], serving: Serving) -> float:
    """The mean error of TTFT, as a fraction; runs that waited for memory left out."""
    return mape(lambda run: run.predicted_ttft_s(serving), steady(runs), lambda run: run.ttft_s)


def fit_serving(runs: Sequence[Run], rounds: int = 300) -> Serving:
    """The constants with the least mean errors. Raises ValueError for no runs, or none that did not wait for memory."""
    if not steady(runs):
        raise ValueError(f"{len(runs)} runs, none with a TTFT of {LONGEST_TTFT_S:g} s or less: measure some at a lower concurrency.")

    def tpot(c: Sequence[float]) -> Serving:
        return Serving(step_overhead_s=c[0], interference=c[1])

    def ttft(c: Sequence[float]) -> Serving:
        return Serving(arrival_s=c[0], queue=c[1], prefill_scale=c[2])

    first = tpot(minimise(lambda c: tpot_error(runs, tpot(c)), (1e-3, 1.0), rounds))
    second = ttft(minimise(lambda c: ttft_error(runs, ttft(c)), (0.03, 0.05, 1.0), rounds))
    return replace(second, step_overhead_s=first.step_overhead_s, interference=first.interference, calibrated=True)
