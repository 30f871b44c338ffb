"""A plan under its load on a virtual clock: the engine's own scheduler decides, and the planner's prices say how long steps take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.engine.admission import Limits
from lockstep.engine.scheduler import Scheduler
from lockstep.planner.answer import Plan
from lockstep.planner.host import HostPricer
from lockstep.planner.layer import Work
from lockstep.planner.layout import Layout
from lockstep.planner.memory import BLOCK_TOKENS
from lockstep.planner.search import request_blocks
from lockstep.planner.step import Pricer
from lockstep.simulation.arrivals import Arrival, at_once, poisson
from lockstep.simulation.cost import StepWork
from lockstep.simulation.engine_cost import CalibratedCost
from lockstep.simulation.report import Report
from lockstep.simulation.simulate import simulate

REQUESTS = 300  # simulated of an open load; of a closed one three for each that runs at once
CONTEXT_GRAIN = 64  # contexts are priced to so many tokens, so that steps that cost alike are priced once


@dataclass(frozen=True)
class PlannedCost:
    """See `StepCost`. A step with prompts and running requests costs what the two would one after the other; prompts that share
    a step are priced together, each with its mean share of their tokens."""

    pricer: Pricer
    layout: Layout

    def stage_s(self, work: StepWork) -> Sequence[float]:
        rows = list(zip(work.queries, work.contexts, strict=True))
        running = [context for queries, context in rows if queries == 1]
        seconds = 0.0
        if running:
            seconds += self.pricer.step(self.layout, Work(True, len(running), _rounded(sum(running) / len(running)))).beat_s
        prompts = [(queries, context - queries) for queries, context in rows if queries > 1]
        if prompts:
            tokens, before = (sum(column) for column in zip(*prompts, strict=True))
            seconds += self.pricer.step(self.layout, Work(False, tokens, _rounded(before / len(prompts)), len(prompts))).beat_s
        return [seconds] * self.layout.pp

    def hop_s(self, work: StepWork) -> float:
        hops = max(1, self.layout.pp - 1)
        return self.pricer.step(self.layout, Work(True, max(1, work.tokens), CONTEXT_GRAIN)).hop_s / hops

    def driver_s(self, work: StepWork) -> float:
        del work
        return 0.0


def _rounded(context: float) -> float:
    return float(round(context / CONTEXT_GRAIN) * CONTEXT_GRAIN)


def simulate_plan(plan: Plan, pricer: Pricer) -> Report:
    """The plan's replicas under its rate, requests as they come (Poisson); without a rate, as many at once as it runs."""
    work, layout, running = plan.work, plan.layout, plan.point.concurrency * plan.layout.dp
    if work.rate is not None:
        arrivals: Sequence[Arrival] = poisson(plan.rate, REQUESTS, work.input_len, work.output_len)
    else:
        arrivals = at_once(3 * running, work.input_len, work.output_len)
    limits = Limits(
        num_blocks=plan.limits.max_num_seqs * request_blocks(work.tokens, layout) + 1,
        block_size=BLOCK_TOKENS * layout.cp * layout.dcp,
        max_num_seqs=plan.limits.max_num_seqs,
        max_num_batched_tokens=plan.limits.max_num_batched_tokens,
        max_model_len=plan.limits.max_model_len,
        vocab_size=pricer.setting.shape.vocab_size,
    )
    return simulate(
        lambda clock: Scheduler(limits, prefix_caching=False, stages=layout.pp, clock=clock),
        CalibratedCost(pricer.model(layout)) if isinstance(pricer, HostPricer) else PlannedCost(pricer, layout),
        arrivals,
        replicas=layout.dp,
        depth=layout.pp,
        concurrency=None if work.rate is not None else running,
    )
