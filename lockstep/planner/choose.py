"""Which candidate wins, and which comes nearest where none keeps the promises."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lockstep.planner.layout import Layout
from lockstep.planner.load import Workload
from lockstep.planner.search import Candidate, Search
from lockstep.planner.startable import axes_missing

EQUAL = 1.05  # latencies so far apart are equal where no layout keeps the promises: the prediction is not finer


@dataclass(frozen=True)
class Choice:
    """The winner, those that keep the promises at the rate (best first), and all that were looked at."""

    best: Candidate
    ordered: list[Candidate]
    everything: list[Candidate]


def runs(layout: Layout) -> bool:
    """Whether this version of the engine runs such a split (of a model and on devices that it runs)."""
    return not axes_missing({"ep": layout.ep, "cp": layout.cp, "dcp": layout.dcp})


def choose(search: Search, everything: list[Candidate]) -> Choice:
    """The best of the candidates, of which one at least fits in memory.

    1. Those that carry the rate within the promises, in the search's order.
    2. Else the one that carries most within the promises on the whole cluster.
    3. Where no load of any keeps the promises: these are stretched by the least excess of those that the engine runs (of any chunk)
       and a little more, the winner is the best by 1 and 2 within the stretched ones, and one that the engine runs goes first.
    """
    ordered = search.order(everything)
    if ordered or any(c.best for c in everything):
        return Choice(ordered[0] if ordered else search.nearest(everything)[0], ordered, everything)
    fitting = [c for c in everything if c.fits]
    near = replace(search, work=stretched(search, [c for c in fitting if runs(c.layout)] or fitting))
    again = [replace(near.of_chunks(c.layout), at_least=c.at_least, at_most=c.at_most) for c in fitting]
    keeping = [c for c in again if c.best]
    useful = [c for c in keeping if runs(c.layout)] or keeping
    return Choice((near.order(useful) or near.nearest(useful))[0], near.order(keeping), [*again, *(c for c in everything if not c.fits)])


def stretched(search: Search, fitting: list[Candidate]) -> Workload:
    """The workload with the promises that one request keeps on the layout that comes nearest to both, and a little more."""
    work = search.work
    points = [search.replica(c.layout, chunk).at(1) for c in fitting for chunk in search.chunks() if search.room(c.layout, chunk)[0]]
    alone = [max(1.0, min(each)) for each in zip(*map(work.excess, points), strict=True)]  # each by the layout that is best at it
    nearest = min((work.excess(p) for p in points), key=lambda each: max(e / a for e, a in zip(each, alone, strict=True)))
    factors = [1.0 if e <= 1 else e * EQUAL for e in nearest]
    ttft, tpot = (None if asked is None else asked * f for asked, f in zip((work.ttft_s, work.tpot_s), factors, strict=True))
    return replace(work, ttft_s=ttft, tpot_s=tpot)
