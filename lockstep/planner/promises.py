"""What was promised against what is predicted: kept, kept if the prediction is right, or missed; and what would carry the rate.

Promises are of means: a plan's TTFT and TPOT are those of the average request. How far off such predictions were elsewhere
(`hardware.ErrorBand`) says how sure a promise is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lockstep.planner.hardware import ErrorBand
from lockstep.planner.layout import Layout
from lockstep.planner.load import Point, Workload
from lockstep.planner.search import Candidate, Search
from lockstep.planner.words import ms, rate_of

SURE = "kept even with the expected error"
LIKELY = "kept if the prediction is right"
MISSED = "missed"
EXACTLY = 8  # layouts whose largest load is worked out to one request


@dataclass(frozen=True)
class Promise:
    """One promise. Latencies in seconds, rates in requests per second; `predicted` of a rate is the most within the latencies."""

    name: str  # ttft, tpot or rate
    asked: float
    predicted: float
    error: float  # expected on average, as a fraction
    verdict: str  # SURE, LIKELY or MISSED


def judge(work: Workload, point: Point, most: float, band: ErrorBand) -> list[Promise]:
    """Every promise that was asked for. most: requests per second of the whole plan, within the latencies."""
    found = []
    for name, asked, predicted, error in (("ttft", work.ttft_s, point.ttft_s, band.ttft), ("tpot", work.tpot_s, point.tpot_s, band.tpot)):
        if asked is not None and (work.streams or name == "ttft"):
            found.append(Promise(name, asked, predicted, error, _verdict(predicted / asked, error)))
    if work.rate is not None:  # a request lasts mostly as long as its tokens: their error is the rate's
        found.append(Promise("rate", work.rate, most, band.tpot, _verdict(work.rate / most if most else 2.0, band.tpot)))
    return found


def _verdict(share: float, error: float) -> str:
    """share: of the promise, what the prediction uses."""
    return MISSED if share > 1 + 1e-9 else SURE if share * (1 + error) <= 1 else LIKELY


def misses(work: Workload, point: Point, rate: float, alone: Sequence[Point]) -> list[str]:
    """In words, with both numbers: the promises that the point breaks, or comes nearer to than the margin. alone: single requests
    on every layout, for the best that could be where none keeps a promise under any load."""
    found, less = [], f" less a margin of {work.margin:.0%}" * (work.margin > 0)
    broken = work.misses(point)
    latencies = (
        ("ttft", point.ttft_s, work.ttft_s or 0.0, work.ttft_limit_s, [p.ttft_s for p in alone]),
        ("tpot", point.tpot_s, work.tpot_s or 0.0, work.tpot_limit_s, [p.tpot_s for p in alone]),
    )
    for name, is_s, asked, limit, ones in latencies:
        if name in broken:
            best = min(ones, default=0.0)
            never = f" and cannot be kept at any load (best {ms(best)} at one request)" if best > limit else ""
            found.append(f"{name.upper()} is {ms(is_s)}, {ms(asked)}{less} was asked for{never}")
    if work.rate is not None and rate < work.rate * (1 - 1e-9):
        found.append(f"the whole cluster carries {rate_of(rate)} requests/s, {work.rate:g} were asked for")
    return found


@dataclass(frozen=True)
class Enough:
    """As many nodes as would carry the rate within the latencies; replicas are independent, so they carry in proportion."""

    nodes: int
    devices: int  # of those nodes
    layout: str


def enough(search: Search, candidates: Iterable[Candidate]) -> Enough | None:
    """The fewest nodes that carry the rate; None where every layout breaks a latency under a single request."""
    per_node, rate = search.pricer.setting.cluster.devices_per_node, search.work.rate
    assert rate is not None

    def nodes(c: Candidate) -> tuple[int, float, Layout]:
        count = max(1, math.ceil(rate / c.rate - 1e-9))
        return nodes_of(c, count, per_node), -c.rate / c.devices, c.placed(count)

    likely = sorted((c for c in candidates if c.best is not None), key=nodes)[:EXACTLY]
    if not likely:
        return None
    most, _, layout = min(nodes(search.refined(c)) for c in likely)
    return Enough(most, most * per_node, str(layout))


def nodes_of(c: Candidate, count: int, devices_per_node: int) -> int:
    """Nodes that `count` deployments take, no replica being cut up by a node's border."""
    replicas, size = count * c.layout.dp, c.layout.replica_size
    return -(-replicas // (devices_per_node // size)) if size <= devices_per_node else replicas * (size // devices_per_node)
