"""TP in a node and PP across nodes: when, as a result of the arithmetic and not as a rule.

Two ways to use two nodes, at the same number of running requests: one TP group over both, or a stage on each. Over both, every
rank reads half the weights, and every all-reduce leaves the node; with stages the stream crosses once, and each half of the
requests waits for the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from lockstep.planner.layer import Work
from lockstep.planner.layout import Layout
from lockstep.planner.step import Pricer

REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Crossover:
    """Seconds until every running request has one more token: (requests, one TP group, stages), and where stages begin to win."""

    across: Layout
    staged: Layout
    rows: tuple[tuple[int, float, float], ...]

    @property
    def from_requests(self) -> int | None:
        """The number of requests from which stages are faster, at it and above; None where the TP group is at the last one."""
        found = None
        for requests, tp, pp in reversed(self.rows):
            if pp >= tp:
                break
            found = requests
        return found

    def __str__(self) -> str:
        pair, start = f"{self.staged} (TP in a node, PP across)", self.from_requests
        if start is None:
            return f"{self.across} gives tokens sooner than {pair} at every load up to {REQUESTS[-1]} running requests."
        if start == REQUESTS[0]:
            return f"{pair} gives tokens sooner than {self.across} at every load."
        return f"{pair} gives tokens sooner than {self.across} from {start} running requests on; below, the TP group over both nodes does."


def tp_or_pp(pricer: Pricer, context: float) -> Crossover | None:
    """The comparison on this pricer's model and cluster; None where there is one node, or the model has too few heads."""
    cluster, shape = pricer.setting.cluster, pricer.setting.shape
    tp = cluster.devices_per_node
    if cluster.nodes < 2 or 2 * tp > min(shape.num_heads, shape.intermediate_size) or shape.num_layers < 2:
        return None
    across, staged = Layout(tp=2 * tp), Layout(tp=tp, pp=2)
    rows = []
    for requests in REQUESTS:
        m = min(2, requests)
        whole = pricer.step(across, Work(True, requests, context)).round_s(1)
        halves = pricer.step(staged, Work(True, -(-requests // m), context)).round_s(m)
        rows.append((requests, whole, halves))
    return Crossover(across, staged, tuple(rows))
