"""Why a layout lost: one line made of the terms that differ, at the same number of requests per device."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lockstep.planner import collectives
from lockstep.planner.layout import Layout, Span, tp_span
from lockstep.planner.load import Point
from lockstep.planner.search import Candidate, Search
from lockstep.planner.startable import axes_missing, listed
from lockstep.planner.words import rate_of
from lockstep.utils.sizes import size


@dataclass(frozen=True)
class Runner:
    """A layout that is not the plan, what it would give, and why it lost."""

    layout: Layout
    point: Point | None  # at the rate asked for; None where it does not fit
    rate: float  # requests per second within the promises, on as many devices as the plan has, or its own at least
    reason: str


def runners_up(
    search: Search, winner: Candidate, count: int, ordered: list[Candidate], everything: list[Candidate], most: int = 3
) -> list[Runner]:
    """The best layouts of other kinds than the winner's, and TP across nodes where the cluster has nodes."""
    kinds = {_kind(winner)}
    found: list[Candidate] = []
    keeping = {c.layout for c in ordered}
    for c in [*ordered, *search.nearest(c for c in everything if c.layout not in keeping)[:50]]:
        if len(found) < most and _kind(c) not in kinds:
            kinds.add(_kind(c))
            found.append(c)
    d = search.pricer.setting.cluster.devices_per_node
    wide = [c for c in everything if c.layout.tp > d and _kind(c) not in kinds]
    if wide:
        found.append(max(wide, key=lambda c: (c.fits > 0, c.rate / c.devices, -c.devices)))
    return [_runner(search, winner, count, c) for c in found]


def _kind(c: Candidate) -> tuple[int, int, int, bool]:
    return c.layout.tp, c.layout.pp, c.layout.cp, c.layout.ep > 1


def _runner(search: Search, winner: Candidate, count: int, c: Candidate) -> Runner:
    c = search.refined(c)
    if not c.fits:
        return Runner(c.layout, None, 0.0, f"does not fit: needs {size(c.lacking)} more per rank")
    mine, rate = winner.devices * count, search.work.rate
    used = c.needed(rate) or min(c.at_most, max(1, mine // c.devices))
    point, placed = search.loaded(c, used), c.placed(used)
    parts = [*_shortfall(search, winner, count, c, used, point), *_messages(search, placed), _terms(search, winner, count, c)]
    return Runner(placed, point, c.rate * used, "; ".join(part for part in parts if part))


def _shortfall(search: Search, winner: Candidate, count: int, c: Candidate, used: int, point: Point) -> list[str]:
    """In what it is worse: promises broken, devices, or load."""
    broken = [f"misses {name.upper()}" for name in search.work.misses(point)]
    lacking = axes_missing(asdict(c.layout))
    if lacking and not axes_missing(asdict(winner.layout)) and search.work.misses(search.loaded(winner, count)):
        return [*broken, f"this version does not run {listed(lacking)}, and where no layout keeps the promises one that runs wins"]
    carried, mine, devices = c.rate * used, winner.rate * count, winner.devices * count
    if c.best is None:
        return broken or ["keeps no promise under load"]
    if c.devices * used > devices:
        return [*broken, f"needs {c.devices * used} devices, not {devices}"]
    per_device = c.rate / c.devices / (winner.rate / winner.devices) - 1 if winner.rate else 0.0
    if search.work.rate is not None and carried < search.work.rate:
        return [*broken, f"carries {rate_of(carried)} of {search.work.rate:g} requests/s"]
    return [*broken, f"carries {rate_of(carried)} requests/s, not {rate_of(mine)} ({per_device:+.0%} per device)"]


def _messages(search: Search, placed: Layout) -> list[str]:
    """What its all-reduce costs because the group leaves the node."""
    cluster, shape = search.pricer.setting.cluster, search.pricer.setting.shape
    span = tp_span(placed, cluster.devices_per_node)
    if span.nodes == 1 or not search.grows:  # ranks of one machine are not devices of several
        return []
    wide = float(32 * shape.hidden_size * shape.itemsize)
    across, inside = (collectives.all_reduce_s(cluster, *group, wide) for group in (span, Span(span.ranks_per_node, 1)))
    cost = f"{across * 1e6:.0f} us between nodes" + f", {inside * 1e6:.0f} us inside" * (span.ranks_per_node > 1)
    return [f"TP={placed.tp} spans {span.nodes} nodes: an all-reduce of 32 tokens costs {cost}"]


def _terms(search: Search, winner: Candidate, count: int, c: Candidate) -> str:
    """The largest differences per output token (per prompt, where that is all), with as many requests on each device as the winner has."""
    here = search.replica(winner.layout, winner.chunk)
    running = search.loaded(winner, count).concurrency
    there = search.replica(c.layout, c.chunk)
    same = max(1, min(c.fits, round(running * winner.layout.dp / winner.devices * c.devices / c.layout.dp)))
    streams = search.work.streams
    sides = ((here, running), (there, same))
    mine, its = ({t.name: t.seconds for t in (r.tpot_terms(b) if streams else r.ttft_terms(b))} for r, b in sides)
    differences = sorted(((its.get(name, 0.0) - mine.get(name, 0.0), name) for name in {*mine, *its}), key=lambda each: -abs(each[0]))
    shown = [
        f"{abs(seconds) * 1e3:.2f} ms {'more' if seconds > 0 else 'less'} for {name}"
        for seconds, name in differences[:2]
        if abs(seconds) > 5e-6
    ]
    what = "token" if streams else "prompt"
    return f"compared with this plan, at equal load a device, a {what} takes {' and '.join(shown)}" if shown else ""
