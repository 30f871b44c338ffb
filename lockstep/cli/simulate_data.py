"""`lockstep simulate data`: the teaching simulation of replicas, routed by the server's own rules (`cluster/balance.py`)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lockstep.cluster import balance
from lockstep.cluster.balance import ReplicaLoad
from lockstep.planner.teach import data
from lockstep.planner.teach.data import Choose, Options, Policy, Result, View, picture, report

NO_BOUND = 1e9  # times the mean load; infinity times an idle cluster is no number
__all__ = ["POLICIES", "Options", "picture", "report", "simulate"]


def loads(views: Sequence[View]) -> list[ReplicaLoad]:
    """What the simulation knows, as the rules read it."""
    return [
        ReplicaLoad(i, waiting_tokens=view.waiting_tokens, running_tokens=view.running_tokens, requests=view.requests)
        for i, view in enumerate(views)
    ]


def round_robin(seed: int) -> Choose:
    """In turn; looks at nothing."""
    return lambda views, matches, number: balance.round_robin(loads(views), start=number)


def shortest_queue(seed: int) -> Choose:
    """The least loaded of all."""
    return lambda views, matches, number: balance.shortest_queue(loads(views), start=number)


def power_of_two(seed: int) -> Choose:
    """The less loaded of two drawn at random (Mitzenmacher, 2001)."""
    draw = random.Random(seed)

    def choose(views: Sequence[View], matches: Sequence[int], number: int) -> int:
        two = draw.sample(loads(views), min(2, len(views)))
        return balance.shortest_queue(two)

    return choose


def prefix_affine(seed: int) -> Choose:
    """The one that has most of the prompt cached, unless it carries too much."""
    return lambda views, matches, number: balance.prefix_affine(loads(views), matches, start=number)


def prefix_unbounded(seed: int) -> Choose:
    """The one that has most of the prompt cached, whatever it carries."""
    return lambda views, matches, number: balance.prefix_affine(loads(views), matches, bound=NO_BOUND, start=number)


POLICIES: dict[str, Policy] = {
    "round_robin": round_robin,
    "power_of_two": power_of_two,
    "shortest_queue": shortest_queue,
    "prefix_affine": prefix_affine,
    "prefix_unbounded": prefix_unbounded,
}


def simulate(options: Options) -> Result:
    """All rules over the same load. Raises ConfigError for impossible settings."""
    return data.simulate(options, POLICIES)
