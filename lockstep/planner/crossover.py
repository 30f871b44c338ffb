"""TP in a node and PP across nodes: when, as a result of the arithmetic and not as a rule.

Two ways to use two nodes, at the same number of running requests: one TP group over both, or a stage on each. Over both, every
rank reads half the weights, and every all-reduce leaves the node; with stages the stream crosses once, and each half of the
requests waits for the other.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace

from lockstep.planner.hardware import Link
from lockstep.planner.layer import Work
from lockstep.planner.layout import Layout
from lockstep.planner.step import Pricer
from lockstep.planner.words import ms

REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FREE = Link(0.0, 0.0, 1e18)  # messages that take no time

Row = tuple[int, float, float]


@dataclass(frozen=True)
class Crossover:
    """Seconds until every running request has one more token: (requests, one TP group, stages), and where stages begin to win.

    free: the same if messages between nodes took no time, which says how much of it is the fabric's.
    """

    across: Layout
    staged: Layout
    rows: tuple[Row, ...]
    free: tuple[Row, ...] = ()

    @property
    def from_requests(self) -> int | None:
        """The number of requests from which stages are faster, at it and above; None where the TP group is at the last one."""
        return _from(self.rows)

    def __str__(self) -> str:
        pair, start, most = f"{self.staged} (TP in a node, PP across)", self.from_requests, REQUESTS[-1]
        ends = ", ".join(f"{ms(pp)} against {ms(tp)} at {n}" for n, tp, pp in (self.rows[0], self.rows[-1]))
        compared = f" (steps without prompts: {ends})"
        if start is None:
            return f"{self.across} gives tokens sooner than {pair} at every load up to {most} running requests{compared}."
        words = f"{pair} gives tokens sooner than {self.across}"
        if start > REQUESTS[0]:
            return f"{words} from {start} running requests on{compared}; below, the TP group over both nodes does."
        return f"{words} at every load up to {most} running requests{compared}; {self._if_free()}."

    def _if_free(self) -> str:
        """Where it would turn round, if it would."""
        start = _from(self.free)
        if start == REQUESTS[0]:
            return "it would even if messages between nodes took no time, since sums inside them do"
        return f"if messages between nodes took no time, {'it would nowhere' if start is None else f'only from {start} on'}"


def _from(rows: tuple[Row, ...]) -> int | None:
    found = None
    for requests, tp, pp in reversed(rows):
        if pp >= tp:
            break
        found = requests
    return found


def tp_or_pp(pricer: Pricer, context: float) -> Crossover | None:
    """The comparison on this pricer's model and cluster; None where there is one node, or the model has too few heads."""
    cluster, shape = pricer.setting.cluster, pricer.setting.shape
    tp = cluster.devices_per_node
    if cluster.nodes < 2 or 2 * tp > min(shape.num_heads, shape.intermediate_size) or shape.num_layers < 2:
        return None
    across, staged = Layout(tp=2 * tp), Layout(tp=tp, pp=2)
    free = Pricer(replace(pricer.setting, cluster=cluster.with_links(inter=FREE)))
    return Crossover(across, staged, *(_rows(each, across, staged, context) for each in (pricer, free)))


def _rows(pricer: Pricer, across: Layout, staged: Layout, context: float) -> tuple[Row, ...]:
    """Both times at every number of requests, and at those between that say to one request where stages begin to win."""
    found: dict[int, Row] = {}

    def row(requests: int) -> Row:
        m = min(2, requests)
        whole = pricer.step(across, Work(True, requests, context)).round_s(1)
        halves = pricer.step(staged, Work(True, -(-requests // m), context)).round_s(m)
        return found.setdefault(requests, (requests, whole, halves))

    start = _from(tuple(row(n) for n in REQUESTS))
    if start is not None and start > REQUESTS[0]:
        before = REQUESTS[REQUESTS.index(start) - 1]
        bisect_left(range(before + 1, start), True, key=lambda n: row(n)[2] < row(n)[1])
    return tuple(found[n] for n in sorted(found))
