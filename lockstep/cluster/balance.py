"""Which data-parallel replica takes a request: pure functions of what the replicas carry.

A replica's load is counted in tokens: prompt tokens it has still to compute, and tokens its running requests hold. Every policy
reads a list of `ReplicaLoad`, changes nothing, and returns the index of one routable replica. Two of them trade balance for
something else (a cached prefix, a session kept together), and both give it up at the same bound:

    the chosen replica's load <= least load + max(bound x mean load, SLACK_TOKENS)

where least and mean are over the routable replicas, before the request is added.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lockstep.cluster.errors import RoutingError

# A cached prefix spares one prefill once; a replica that runs 10 % ahead of the others delays all it holds.
AFFINITY_BOUND = 0.06
# A session that moves recomputes its whole history, turn after turn: worth more imbalance than one prefix.
STICKY_BOUND = 0.25
# On a nearly idle cluster any one request is "imbalance". Two typical prompts more than the least loaded harm nobody.
SLACK_TOKENS = 1024


@dataclass(slots=True)
class ReplicaLoad:
    """What one replica carries. Written by the router's `LoadBook`; policies only read it."""

    replica: int  # index of the replica among those of its router
    routable: bool = True  # alive, and not draining: may be given requests
    waiting_tokens: int = 0  # prompt tokens it has still to compute
    running_tokens: int = 0  # tokens its running requests hold, or are expected to
    requests: int = 0  # requests it has been given that have not ended
    given_up: bool = False  # not routable, and never again

    @property
    def tokens(self) -> int:
        """All it carries, in tokens."""
        return self.waiting_tokens + self.running_tokens


Cost = Callable[[ReplicaLoad], float]


def all_tokens(load: ReplicaLoad) -> float:
    """The usual cost of a replica: a waiting token counts as much as a running one."""
    return load.waiting_tokens + load.running_tokens


def round_robin(loads: Sequence[ReplicaLoad], start: int = 0) -> int:
    """The first routable replica at or after `start`, going round. Looks at no load; raises RoutingError if none is routable."""
    able = routable(loads)
    return min(able, key=lambda load: (load.replica - start) % len(loads)).replica


def shortest_queue(loads: Sequence[ReplicaLoad], cost: Cost = all_tokens, start: int = 0) -> int:
    """Join the shortest queue: the routable replica of least cost.

    `cost` gives a replica's load (in tokens by default); slow replicas or dear waiting tokens are a matter of another cost. Of
    equal ones the replica with the fewest requests, then the first at or after `start` (pass a counter, and an idle cluster
    fills in turn). Raises RoutingError if none is routable.
    """
    return _least([(load, cost(load)) for load in routable(loads)], start, len(loads)).replica


def prefix_affine(
    loads: Sequence[ReplicaLoad],
    matches: Sequence[int],
    bound: float = AFFINITY_BOUND,
    slack_tokens: int = SLACK_TOKENS,
    cost: Cost = all_tokens,
    start: int = 0,
) -> int:
    """The replica that holds most of the prompt, unless it carries too much.

    `matches[i]` is how many prompt tokens replica i is believed to have cached. Of the replicas within the bound (see the top of
    this file) the longest match wins, and of equal matches the shortest queue; without any match there, that is the shortest
    queue of all. A prefix that is too popular for its replica spreads in this way to the next, which then matches as well.
    Raises RoutingError if none is routable.
    """
    within = _within(routable(loads), bound, slack_tokens, cost)
    longest = max([matches[load.replica] for load, _ in within])
    return _least([pair for pair in within if matches[pair[0].replica] == longest], start, len(loads)).replica


def sticky(
    session_id: str,
    loads: Sequence[ReplicaLoad],
    bound: float = STICKY_BOUND,
    slack_tokens: int = SLACK_TOKENS,
    cost: Cost = all_tokens,
) -> int:
    """The same replica for every request of a session, as long as that replica is routable and within the bound.

    Rendezvous hashing (Thaler and Ravishankar, 1998): 1. every replica draws a number from the session's name; 2. the highest
    wins. A replica that leaves hands on its own sessions only, and gets the same ones back when it returns. The bound is that of
    consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, 2018): over it, the next highest is asked. Equal on
    every machine and in every process. Raises RoutingError if none is routable.
    """
    within = _within(routable(loads), bound, slack_tokens, cost)
    draws = _draws(session_id, max(load.replica for load in loads) + 1)
    return max([load.replica for load, _ in within], key=draws.__getitem__)


def explicit(replica: int, loads: Sequence[ReplicaLoad], first: int = 0) -> int:
    """The index of the replica that the request itself names, routable or not. first: the number of the one with index 0.

    Raises RoutingError if there is no such replica, or never again.
    """
    for load in loads:
        if first + load.replica == replica:
            if not load.given_up:
                return load.replica
            others = [first + other.replica for other in loads if not other.given_up]
            remedy = f"Name one of {_listed(others)}, or none." if others else "So were all others: start the engine anew."
            raise RoutingError(f"data_parallel_rank={replica} takes no requests any more: its replica was given up. {remedy}")
    known = _listed([first + load.replica for load in loads])
    raise RoutingError(f"data_parallel_rank={replica} does not exist: the replicas are {known}. Name one of them, or none.")


def routable(loads: Sequence[ReplicaLoad]) -> list[ReplicaLoad]:
    """The replicas that take requests, never an empty list: raises RoutingError instead."""
    able = [load for load in loads if load.routable]
    if not able:
        raise RoutingError(
            f"0 of {len(loads)} replicas take requests, and at least 1 has to: all are down or draining. "
            "Try again once a replica is back; the supervisor's log says why each went."
        )
    return able


Costed = list[tuple[ReplicaLoad, float]]  # each with its cost, which is asked for once


def _least(loads: Costed, start: int, count: int) -> ReplicaLoad:
    least = min([cost for _, cost in loads])
    ties = [load for load, cost in loads if cost == least]
    return ties[0] if len(ties) == 1 else min(ties, key=lambda load: (load.requests, (load.replica - start) % count))


def _within(loads: list[ReplicaLoad], bound: float, slack_tokens: int, cost: Cost) -> Costed:
    """Those whose cost is within the bound of the least. The least loaded always is."""
    costs = [cost(load) for load in loads]
    most = min(costs) + max(bound * (sum(costs) / len(costs)), slack_tokens)
    return [(load, one) for load, one in zip(loads, costs, strict=True) if one <= most]


def _draws(session_id: str, replicas: int) -> tuple[int, ...]:
    """A session's number for each replica. One long digest, of which more replicas read further and none reads otherwise."""
    digest = hashlib.shake_128(session_id.encode("utf-8", "surrogatepass")).digest(8 * replicas)
    return struct.unpack(f"<{replicas}Q", digest)


def _listed(replicas: list[int]) -> str:
    """`0 to 63` where there are no gaps, else all of them."""
    if len(replicas) > 2 and replicas[-1] - replicas[0] == len(replicas) - 1:
        return f"{replicas[0]} to {replicas[-1]}"
    return ", ".join(map(str, replicas))
