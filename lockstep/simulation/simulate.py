"""Replicas, a router and clients under one virtual clock: events in order of time, nothing left to chance.

1. The next event is the earliest of: a request's arrival, a replica's `wake_s`. At one time arrivals come first, then
   replicas in order.
2. An arrival is given to the replica that the router names, from what the replicas carry at that moment.
3. A replica that wakes takes its oldest step's result and issues new steps (see `engine.py`).
With `concurrency`, an arrival waits until fewer than so many requests are unfinished, as clients that ask again do; with `ramp_s`
these clients do not begin together, but one after the other, evenly over that time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lockstep.engine.errors import RequestError
from lockstep.engine.scheduler import Scheduler
from lockstep.simulation.arrivals import Arrival, as_request
from lockstep.simulation.clock import VirtualClock
from lockstep.simulation.cost import StepCost
from lockstep.simulation.engine import SimulatedEngine
from lockstep.simulation.report import Report, Served

MakeScheduler = Callable[[VirtualClock], Scheduler]


@dataclass(slots=True)
class ReplicaView:
    """What a router may know of a replica; the fields of `cluster.balance.ReplicaLoad`, whose policies read it as well."""

    replica: int
    waiting_tokens: int
    running_tokens: int
    requests: int
    routable: bool = True
    given_up: bool = False


Router = Callable[[Sequence[ReplicaView], int], int]  # (replicas, number of the request) -> index of one


def in_turn(replicas: Sequence[ReplicaView], number: int) -> int:
    """Round robin."""
    return number % len(replicas)


def simulate(
    make_scheduler: MakeScheduler,
    cost: StepCost,
    arrivals: Sequence[Arrival],
    *,
    replicas: int = 1,
    depth: int = 1,
    router: Router = in_turn,
    concurrency: int | None = None,
    ramp_s: float = 0.0,
    until_s: float = math.inf,
) -> Report:
    """Run every arrival (in order of time) to its end, or until `until_s`: what is unfinished then stays so.

    make_scheduler: called once for each replica with the clock. depth: steps in flight of a replica. The report has a
    request that can never run as `refused`, with the scheduler's words.
    """
    assert replicas >= 1 and (concurrency is None or concurrency >= 1)
    clock = VirtualClock()
    engines = [SimulatedEngine(make_scheduler(clock), cost, depth=depth) for _ in range(replicas)]
    return _Run(clock, engines, list(arrivals), router, concurrency, ramp_s, until_s).run()


class _Run:
    """One run's state."""

    def __init__(
        self, clock: VirtualClock, engines: list[SimulatedEngine], arrivals: list[Arrival], router: Router,
        concurrency: int | None, ramp_s: float, until_s: float,
    ) -> None:  # fmt: skip
        self._clock, self._engines, self._arrivals, self._router = clock, engines, arrivals, router
        self._ramp_s, self._until_s = ramp_s, until_s
        self._most = len(arrivals) + 1 if concurrency is None else concurrency
        self._requests: list[Served] = []  # that have arrived
        self._unfinished = 0
        self._end_s = 0.0

    def run(self) -> Report:
        while (event := self._next()) is not None:
            at_s, engine = event
            if at_s > self._until_s:
                return Report(self._requests, [engine.report for engine in self._engines], self._until_s)
            self._clock.advance(at_s)
            if engine is None:
                self._arrive(self._arrivals[len(self._requests)])
            else:
                self._advance(engine)
        assert not self._unfinished, f"{self._unfinished} requests never ended"
        return Report(self._requests, [engine.report for engine in self._engines], self._end_s)

    def _next(self) -> tuple[float, SimulatedEngine | None] | None:
        """The earliest event: its time, and the replica that wakes (None: a request arrives)."""
        found: tuple[float, SimulatedEngine | None] | None = None
        if len(self._requests) < len(self._arrivals) and self._unfinished < self._most:
            client_s = self._ramp_s * self._unfinished / self._most  # when so many clients and one more have begun
            found = max(self._arrivals[len(self._requests)].at_s, self._clock.now_s, client_s), None
        for engine in self._engines:
            if engine.wake_s is not None and (found is None or engine.wake_s < found[0]):
                found = engine.wake_s, engine
        return found

    def _arrive(self, arrival: Arrival) -> None:
        number, now_s = len(self._requests), self._clock.now_s
        replica = self._router([_view(i, engine) for i, engine in enumerate(self._engines)], number) if len(self._engines) > 1 else 0
        served = Served(now_s, arrival.input_tokens, replica)
        self._requests.append(served)
        engine = self._engines[replica]
        request = as_request(number, Arrival(now_s, arrival.input_tokens, arrival.output_tokens), engine.scheduler.limits.vocab_size)
        try:
            engine.add(request, now_s)
            self._unfinished += 1
        except RequestError as e:
            served.refused = str(e)

    def _advance(self, engine: SimulatedEngine) -> None:
        now_s = self._clock.now_s
        for output in engine.advance(now_s):
            served = self._requests[int(output.request_id)]
            served.token_s += [now_s] * len(output.new_token_ids)
            if output.finish_reason is not None:
                served.preemptions, served.ended = output.preemptions, True
                self._unfinished -= 1
                self._end_s = now_s


def _view(number: int, engine: SimulatedEngine) -> ReplicaView:
    load = engine.scheduler.load()
    return ReplicaView(number, load.waiting_tokens, load.running_tokens, load.requests)
