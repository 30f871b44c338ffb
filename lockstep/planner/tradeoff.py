"""The trade between a user's speed and a device's over all layouts and loads, without pricing most of them."""

from __future__ import annotations

from collections.abc import Iterable

from lockstep.planner.pareto import Frontier, Mark
from lockstep.planner.search import Candidate, Search, loads

DRAWN = 200  # layouts: those that carry most for each device within the promises


def trade_off(search: Search, everything: Iterable[Candidate]) -> list[Mark]:
    """What nothing beats, of the best layouts that fit at every load that is tried, whatever was promised.

    With the load a user gets slower and a device makes more. So of the loads between two, none is better than the lower one for its
    user and the higher one for its device at once: where something beats that, they are not looked at.
    """
    found = Frontier()
    for c in sorted((c for c in everything if c.fits), key=lambda c: (-c.rate / c.devices, c.layout))[:DRAWN]:
        _add(search, c, found)
    return found.marks


def _add(search: Search, c: Candidate, found: Frontier) -> None:
    replica, out = search.replica(c.layout, c.chunk), search.work.output_len
    sizes = loads(c.layout.pp, min(c.fits, replica.most))

    def mark(i: int) -> Mark:
        p = replica.at(sizes[i])
        made = Mark(str(c.layout), sizes[i], 1 / p.tpot_s, p.rate * out * c.layout.dp / c.devices, p.ttft_s)
        found.add(made)
        return made

    first, last = mark(0), mark(len(sizes) - 1)
    waiting = [(0, first, len(sizes) - 1, last)]
    while waiting:
        low, fast, high, most = waiting.pop()
        if high - low < 2 or found.beats(fast.user, most.device):
            continue
        between = (low + high) // 2
        middle = mark(between)
        waiting += [(low, fast, between, middle), (between, middle, high, most)]
