"""A plan under its load on a virtual clock: the engine's own scheduler decides, and the planner's prices say how long steps take.

Replicas are equal and take requests in turn, so one of them is simulated, under every n-th request of the whole plan's: exactly
what it would get. What is reported is the steady middle: the time in which the first requests fill the replica is left out, and
the run ends before it empties.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lockstep.config.errors import ConfigError
from lockstep.engine.admission import Limits
from lockstep.engine.scheduler import Scheduler
from lockstep.planner.answer import Plan
from lockstep.planner.host import HostPricer
from lockstep.planner.layer import Work
from lockstep.planner.layout import Layout
from lockstep.planner.memory import BLOCK_TOKENS
from lockstep.planner.search import request_blocks
from lockstep.planner.step import Pricer
from lockstep.planner.words import ms, rate_of
from lockstep.simulation.arrivals import Arrival, at_once, poisson
from lockstep.simulation.cost import StepWork
from lockstep.simulation.engine_cost import CalibratedCost
from lockstep.simulation.report import Report, Window
from lockstep.simulation.simulate import simulate

REQUESTS = 300  # that the steady middle has at least, and how long it is at least
SECONDS = 60.0
STEADY = 0.93  # of the requests that come, those that are answered in the same time: with less, a queue grows
GROWS = 1.25  # the median TTFT of the second half over that of the first: more with a queue that grows
LATE = 3.0  # the median TTFT over the planned one: more where a queue has grown to what the seats allow
LONGER = 1.1  # a request's stay over the planned one, beyond which the run is warmed up for that
WARM_UP = 1.25  # residence times that are left out: one to fill the replica, and a part of one for what that leaves uneven
LEAST = 0.25  # residence times that the steady middle has at least
MOST_TOKENS, TOO_MANY = 600_000, 1_500_000  # generated in a run: beyond the first the middle is shorter, beyond the second it is refused
CONTEXT_GRAIN = 64  # contexts are priced to so many tokens, so that steps that cost alike are priced once
SERVER_ONLY = ("arrival", "prefill beyond its own steps")  # terms of the TTFT of a real server that nothing simulated has
QUEUE = "queue"  # is one too where clients ask again when they are answered; at a rate requests come at random, and queue here too


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


@dataclass(frozen=True)
class Simulated:
    """One replica's run, and its steady middle."""

    plan: Plan
    report: Report
    window: Window
    short: bool  # the middle is shorter than it should be, since the run would have taken too long

    @property
    def analytic_ttft_s(self) -> float:
        """The plan's TTFT without what a real server adds, which a simulated one does not."""
        left = SERVER_ONLY if self.plan.work.rate is not None else (*SERVER_ONLY, QUEUE)
        return math.fsum(t.seconds for t in self.plan.ttft_terms if t.name not in left)

    @property
    def overloaded(self) -> bool:
        """Whether requests come faster than the scheduler gets them done."""
        w = self.window
        few = self.plan.work.rate is not None and w.rate * self.plan.layout.dp < STEADY * self.plan.rate
        return few and (w.ttft_growth() > GROWS or w.ttft_s(0.5) > LATE * self.analytic_ttft_s)

    def to_json(self) -> dict[str, Any]:
        """Seconds, and requests and tokens per second of the whole plan."""
        w, work, replicas, shares = self.window, self.plan.work, self.plan.layout.dp, {"p50": 0.5, "p90": 0.9, "p99": 0.99}
        return {
            "rate_asked": self.plan.work.rate,
            "rate_simulated": self.plan.rate if self.plan.work.rate is not None else None,
            "clients": None if self.plan.work.rate is not None else self.plan.point.concurrency * replicas,
            "replicas": replicas,
            "seconds": w.until_s - w.since_s,
            "requests_of_a_replica": len(w.ended),
            "ttft_s": {name: w.ttft_s(share) for name, share in shares.items()} | {"mean": w.mean_ttft_s},
            "tpot_s": {name: w.tpot_s(share) if work.streams else None for name, share in shares.items()}
            | {"mean": w.mean_tpot_s if work.streams else None},
            "analytic_ttft_without_server_s": self.analytic_ttft_s,
            "rate": w.rate * replicas,
            "output_tokens_per_s": w.throughput * replicas,
            "preemptions": sum(r.preemptions for r in self.report.requests),
            "overloaded": self.overloaded,
            "misses": self.misses(),
            "short": self.short,
        }

    def misses(self) -> list[str]:
        """Promises that a percentile breaks, in words."""
        w, work, found = self.window, self.plan.work, []
        for name, asked, of in (("TTFT", work.ttft_s, w.ttft_s), ("TPOT", work.tpot_s if work.streams else None, w.tpot_s)):
            broken = [(label, of(share)) for label, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)) if asked and of(share) > asked]
            if asked and broken:
                found.append(f"{broken[0][0]} {name} {ms(broken[0][1])} misses {ms(asked)}")
        return found

    def describe(self) -> str:
        """The figures as text."""
        w, replicas, work = self.window, self.plan.layout.dp, self.plan.work
        one = f"one of {replicas} equal replicas, " if replicas > 1 else ""
        busy = [f"stages busy   {', '.join(f'{share:.0%}' for share in self.report.stage_usage())}"] if work.rate is None else []
        return "\n".join(
            [
                f"load          {self._load()}",
                f"simulated     {one}{w.until_s - w.since_s:,.0f} s after a warm-up of {w.since_s:,.0f} s, {len(w.ended)} requests"
                + (" (fewer than would be steady: more would take too long here)" if self.short else ""),
                f"TTFT          {ms(w.mean_ttft_s)} mean, {_shares(w.ttft_s)}",
                f"  analytic    {ms(self.analytic_ttft_s)}{self._server()}",
                *(
                    [f"TPOT          {ms(w.mean_tpot_s)} mean, {_shares(w.tpot_s)}", f"  analytic    {ms(self.plan.tpot_s)}"]
                    if work.streams
                    else ["TPOT          -"]
                ),
                f"throughput    {rate_of(w.rate * replicas)} requests/s, {w.throughput * replicas:,.1f} output tokens/s in all",
                *(["overloaded    requests come faster than they are answered: a queue grows, and TTFT with it"] * self.overloaded),
                f"preemptions   {sum(r.preemptions for r in self.report.requests)}",
                *busy,
                *([f"promises      {'; '.join(self.misses()) or 'p50, p90 and p99 keep them'}"] if work.ttft_s or work.tpot_s else []),
            ]
        )

    def _server(self) -> str:
        """What the analytic TTFT is without, where the plan's has it."""
        if math.isclose(self.analytic_ttft_s, self.plan.ttft_s):
            return ""
        there = "arrival and queue, which nothing here has" if self.plan.work.rate is None else "arrival, which is not here"
        return f" without a server's {there}; hold {ms(self.plan.ttft_s)}, with it, against a promise"

    def _load(self) -> str:
        work, carried = self.plan.work, self.plan.rate
        if work.rate is None:
            clients = self.plan.point.concurrency * self.plan.layout.dp
            return f"{clients:,} clients that each ask again when they are answered"
        if carried < work.rate * (1 - 1e-9):
            return f"{rate_of(carried)} requests/s, what this plan carries; not the {work.rate:g} asked for"
        return f"{work.rate:g} requests/s, at random (Poisson)"


def _shares(of: Any) -> str:
    return f"{ms(of(0.5))} median, {ms(of(0.9))} p90, {ms(of(0.99))} p99"


def simulate_plan(plan: Plan, pricer: Pricer) -> Simulated:
    """The plan under its rate, requests as they come (Poisson); without a rate, as many clients as it runs requests at once.

    Where requests come at a rate and stay longer than planned, the replica was not full yet: then once more, warmed up for as long.
    Raises ConfigError for a load whose steady state is so many tokens away that a simulation would take minutes.
    """
    planned_s = plan.ttft_s + (plan.work.output_len - 1) * plan.tpot_s
    found = _run(plan, pricer, planned_s)
    stay_s = found.window.mean_ttft_s + (plan.work.output_len - 1) * found.window.mean_tpot_s
    if plan.work.rate is None or stay_s < LONGER * planned_s:
        return found
    try:
        return _run(plan, pricer, stay_s)
    except ConfigError:
        return found


def _run(plan: Plan, pricer: Pricer, residence_s: float) -> Simulated:
    work, layout, replicas, running = plan.work, plan.layout, plan.layout.dp, plan.point.concurrency
    rate = plan.rate / replicas
    warm_s = WARM_UP * residence_s
    wanted_s = max(SECONDS, REQUESTS / rate)
    least = rate * work.output_len * (warm_s + LEAST * residence_s)
    if least > TOO_MANY:
        raise ConfigError(
            f"--simulate: {running} requests at once of {work.output_len} tokens are steady after {least / 1e6:.1f} million simulated "
            f"tokens, more than {TOO_MANY / 1e6:g} million: give a lower --rate, or a shorter --output-len."
        )
    length_s = min(wanted_s, max(LEAST * residence_s, MOST_TOKENS / (rate * work.output_len) - warm_s))
    until_s = warm_s + length_s
    count = math.ceil(rate * until_s * 2) + 2 * running + 10  # more than can come until then
    arrivals: Sequence[Arrival]
    if work.rate is not None:
        arrivals = poisson(plan.rate, count * replicas, work.input_len, work.output_len)[::replicas]
    else:
        arrivals = at_once(count, work.input_len, work.output_len)
    limits = Limits(
        num_blocks=plan.limits.max_num_seqs * request_blocks(work.tokens, layout) + 1,
        block_size=BLOCK_TOKENS * layout.cp * layout.dcp,
        max_num_seqs=plan.limits.max_num_seqs,
        max_num_batched_tokens=plan.limits.max_num_batched_tokens,
        max_model_len=plan.limits.max_model_len,
        vocab_size=pricer.setting.shape.vocab_size,
    )
    report = simulate(
        lambda clock: Scheduler(limits, prefix_caching=False, stages=layout.pp, clock=clock),
        CalibratedCost(pricer.model(layout)) if isinstance(pricer, HostPricer) else PlannedCost(pricer, layout),
        arrivals,
        depth=layout.pp,
        concurrency=None if work.rate is not None else running,
        ramp_s=residence_s,
        until_s=until_s,
    )
    return Simulated(plan, report, report.between(warm_s, until_s), short=length_s < wanted_s)
