"""The search: every layout of the space, its memory, the most requests it may run at once within the promises, and the order.

What wins: with a rate, the fewest devices that carry it within the promises, and among those the one that could carry most;
without a rate, the one that carries most on the whole cluster, at the smallest load that does so to 2 %. Layers are priced once
for each (tp, cp, ep) and work, pipelines are sums of them, and the largest load is found by bisection (latencies grow with it):
so 10,000 devices take seconds.

A few sizes of batch are tried for every layout, which bounds what it can carry at any size. In the order of these bounds loads are
then found to one request, until nothing that is left could be better.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heapify, heappop, heappush
from typing import Any, ClassVar, NamedTuple

from lockstep.planner import memory
from lockstep.planner.hardware import DTYPE_BYTES, ZERO_CALIBRATION, ErrorBand
from lockstep.planner.layer import Setting
from lockstep.planner.layout import Layout
from lockstep.planner.load import Point, Replica, Serving, Workload
from lockstep.planner.memory import BLOCK_TOKENS, RankMemory
from lockstep.planner.ranks import RankGroup, alike
from lockstep.planner.space import deployments, deployments_at_once
from lockstep.planner.step import Pricer

CHUNKS = (512, 2048, 8192)
MOST_SEQS = 1024  # of one replica
EXACT = 8  # layouts at the head of an order whose loads are found to one request
STAGES = 0.10  # how much further off a pipeline's predictions may be: of the formulas of load against the scheduler on a virtual clock
ROUGH_STAGES = "the formulas of a pipeline under load are up to 9% off what the engine's own scheduler does with it: --simulate runs that"
ENOUGH = 0.98  # of the most requests per second: what a larger batch adds then is latency
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One deployment's layout, prompts in chunks of `chunk`, with what memory and the promises allow."""

    layout: Layout
    chunk: int
    fits: int  # requests of full length in the KV cache of one replica; 0: none, see `lacking`
    lacking: int  # bytes per rank that one request would need more
    best: Point | None  # the largest load of one replica within the promises, of those tried
    at_most: int  # deployments that the cluster has room for
    devices: int  # that one deployment takes
    until: int  # the first load above `best` that breaks a promise or does not fit, of those tried
    bound: float  # requests per second that one deployment cannot exceed within the promises, whatever the load and chunk
    rivals: tuple[Candidate, ...] = ()  # the same layout with other chunks, which may carry more at a load not tried
    at_least: int = 1  # deployments that were asked for

    @property
    def rate(self) -> float:
        """Requests per second of one deployment, within the promises."""
        return self.best.rate * self.layout.dp if self.best else 0.0

    def needed(self, rate: float | None, each: float | None = None) -> int:
        """Deployments for `rate`, or all there is room for; 0 where even those cannot carry it. each: what one carries, if not `rate`."""
        each = self.rate if each is None else each
        if not each:
            return 0
        if rate is None:
            return self.at_most
        count = max(self.at_least, math.ceil(rate / each - 1e-9))
        return count if count <= self.at_most else 0

    def pinned(self, count: int) -> Candidate:
        """The same where just `count` deployments are asked for."""
        return replace(self, at_least=count, at_most=count)

    def placed(self, count: int) -> Layout:
        """`count` deployments of it."""
        a = self.layout
        return Layout(a.tp, a.pp, a.dp * count, a.ep, a.cp, a.dcp)


class Kept(NamedTuple):
    """What a rank keeps, whatever the load: bytes of weights, bytes of each cached token, and whether it is on the last stage."""

    weights: int
    kv_per_token: int
    last: bool


@dataclass(frozen=True)
class Search:
    """What is asked of a search."""

    pricer: Pricer
    work: Workload
    serving: Serving
    memory_share: float = 0.9
    grows: ClassVar[bool] = True  # whether more devices of the kind could be had

    def replica(self, layout: Layout, chunk: int) -> Replica:
        """A replica of the layout under this workload."""
        return Replica(self.pricer, layout, self.work, chunk, self.serving)

    def band(self, layout: Layout, chunk: int) -> ErrorBand:
        """How far off predictions of the layout are, prompts cut into chunks of at most `chunk` tokens.

        What was measured of a machine's engine is of its own steps, not of these prices.
        """
        device = self.pricer.setting.device
        band = device.band if device.engine is None else ZERO_CALIBRATION
        return band if layout.pp == 1 else replace(band, tpot=band.tpot + STAGES, ttft=band.ttft + STAGES)

    def notes(self, layout: Layout, chunk: int) -> list[str]:
        """What a reader should know about these numbers."""
        return [ROUGH_STAGES] if layout.pp > 1 else []

    def fullest(self, layout: Layout, chunk: int, rows: int) -> tuple[int, RankMemory]:
        """(bytes free for KV, memory) of the rank of the pipeline with room for the fewest tokens."""
        s = self.pricer.setting
        capacity = int(s.device.capacity_bytes * self.memory_share)
        found = [self._with_work(layout, kept, chunk, rows) for kept in self._fullest(layout)]
        return min(((capacity - rank.fixed, rank) for rank in found), key=lambda each: each[0] / each[1].kv_per_token)

    @cached_property
    def _kept(self) -> dict[tuple[int, int, int], list[Kept]]:
        return {}

    def _fullest(self, layout: Layout) -> list[Kept]:
        """Of each kind of stage, the ranks one of which is the fullest. Kept: chunk, load and context ranks do not change it."""
        key = (layout.tp, layout.pp, layout.ep)
        if key not in self._kept:
            stages = [each.place for each in self.pricer.different(layout.pp)]
            ranks = memory.fullest_ranks(self.pricer.setting.shape, layout.tp)
            self._kept[key] = [self._of(layout, stage, rank) for stage in stages for rank in ranks]
        return self._kept[key]

    def _of(self, layout: Layout, stage: int, rank: int) -> Kept:
        """Whatever the load, what a rank of a stage keeps. rank: in the expert group, if there is one."""
        s, part, routed = self.pricer.setting, self.pricer.stages(layout.pp)[stage], dict[bool, int]()
        for (kind, _), count in part.kinds:
            routed[kind] = routed.get(kind, 0) + count
        width = memory.kv_elements(s.shape, layout.tp, rank % layout.tp) * DTYPE_BYTES[s.kv_dtype or s.shape.dtype]
        weights = memory.stage_bytes(s.shape, layout, routed, rank, s.weight_dtype, first=part.first, last=part.last)
        return Kept(weights, int(sum(routed.values()) * width), part.last)

    def _with_work(self, layout: Layout, kept: Kept, chunk: int, rows: int) -> RankMemory:
        """With what it needs for a step that has a chunk beside the running requests."""
        shape = self.pricer.setting.shape
        buffers = memory.buffer_bytes(shape, rows) if kept.last else memory.LIBRARY_BYTES
        return RankMemory(kept.weights, kept.kv_per_token, memory.activation_bytes(shape, layout, chunk + rows), buffers)

    def ranks(self, layout: Layout, chunk: int, rows: int) -> list[RankGroup]:
        """What every rank of a deployment holds: TP ranks of each stage, or those of its expert group."""
        shape = self.pricer.setting.shape

        def kind(rank: int) -> object:
            local = memory.expert_shard(shape, layout, rank)
            return memory.held(shape, layout.tp, rank % layout.tp), local and local.size

        stages, ranks = alike(self.pricer.stages(layout.pp)), alike(map(kind, range(max(layout.tp, layout.ep))))
        return [RankGroup(a, b, self._with_work(layout, self._of(layout, a[0], b[0]), chunk, rows)) for a in stages for b in ranks]

    def room(self, layout: Layout, chunk: int) -> tuple[int, int]:
        """(requests of the asked lengths that fit in a replica, bytes that are missing for the longest one that is let in)."""
        each, longest = (request_blocks(tokens, layout) * BLOCK_TOKENS for tokens in (self.work.tokens, self.work.longest))
        rows, fits = 1, 0
        for _ in range(2):  # the more requests, the larger the buffers for their logits
            free, rank = self.fullest(layout, chunk, rows)
            if free < longest * rank.kv_per_token:
                return (fits, 0) if fits else (0, longest * rank.kv_per_token - free)
            fits = min(MOST_SEQS, free // (each * rank.kv_per_token))
            rows = -(-fits // layout.pp)
        return fits, 0

    def candidate(self, layout: Layout, chunk: int, near: int = 1) -> Candidate:
        """The layout's memory, and the largest of a few loads that keeps the promises. near: as `largest` takes it."""
        fits, lacking = self.room(layout, chunk)
        best, until, bound = self.largest(self.replica(layout, chunk), fits, near) if fits else (None, 1, 0.0)
        return Candidate(layout, chunk, fits, lacking, best, self.at_most(layout), self.devices(layout), until, bound * layout.dp)

    @cached_property
    def layouts(self) -> list[Layout]:
        """The whole space."""
        s = self.pricer.setting
        return list(deployments(s.shape, s.cluster, self.work.input_len))

    def at_most(self, layout: Layout) -> int:
        """Deployments that the cluster has room for."""
        return deployments_at_once(layout.replica_size, layout.dp, self.pricer.setting.cluster)

    def devices(self, layout: Layout) -> int:
        """Devices that one deployment takes."""
        return layout.devices

    def with_setting(self, setting: Setting) -> Search:
        """The same search in another setting."""
        return replace(self, pricer=Pricer(setting))

    def largest(self, replica: Replica, fits: int, near: int = 1) -> tuple[Point | None, int, float]:
        """(the largest of a few loads within the promises, the first one that is none or does not fit, the most that any can carry).

        Times grow with the load, so n times as many requests make n times the rate at most, and less than a larger batch.
        near: about how many requests a micro-batch has then; a good guess saves prices.
        """
        fits = min(fits, replica.most)
        sizes = loads(replica.layout.pp, fits)
        points: dict[int, Point] = {}

        def bad(i: int) -> bool:
            points[i] = replica.at(sizes[i])
            return bool(self.work.misses(points[i]))

        found = last_good(bad, len(sizes), bisect_left(sizes, near * replica.layout.pp))
        if found < 0:
            return None, 1, 0.0
        until = sizes[found + 1] if found + 1 < len(sizes) else fits + 1
        bound = points[found].rate * (until - 1) / sizes[found]
        return points[found], until, bound if found + 1 == len(sizes) else max(points[found].rate, min(bound, points[found + 1].rate))

    def exact(self, replica: Replica, fits: int, good: Callable[[Point], bool]) -> int:
        """The most requests at once, to one, that are `good`; 0 where one is not."""
        return bisect_left(range(1, min(fits, replica.most) + 1), True, key=lambda b: not good(replica.at(b)))

    def refined(self, c: Candidate) -> Candidate:
        """The candidate with the chunk and the load, to one request, that carry most."""
        found = self._to_one(c)
        for rival in c.rivals:
            if rival.bound > found.rate:
                found = max(found, self._to_one(rival), key=lambda each: each.rate)
        return replace(found, bound=found.rate, rivals=(), at_least=c.at_least, at_most=c.at_most)

    def _to_one(self, c: Candidate) -> Candidate:
        """The candidate with the load from `best` to `until` that carries most: the largest, or the last that fills micro-batches."""
        if c.best is None or c.until <= c.best.concurrency + 1:
            return c
        replica, least = self.replica(c.layout, c.chunk), c.best.concurrency
        more = bisect_left(range(least + 1, c.until), True, key=lambda b: bool(self.work.misses(replica.at(b))))
        most, pp = least + more, c.layout.pp
        points = [c.best, *(replica.at(b) for b in {most, most - most % pp} if b > least)]
        return replace(c, best=max(points, key=lambda p: (p.rate, -p.concurrency)), until=most + 1)

    def at_rate(self, replica: Replica, fits: int, rate: float) -> Point:
        """The smallest load of a replica that makes `rate`, or the largest that it can have."""
        most = min(fits, replica.most)
        found = bisect_left(range(1, most + 1), rate, key=lambda b: replica.at(b).rate)
        return replica.at(min(most, found + 1))

    def chunks(self) -> list[int]:
        """Sizes of chunk that cut this prompt differently."""
        cuts = {-(-self.work.input_len // c): c for c in reversed(CHUNKS)}
        return sorted(cuts.values())

    def all(self, wanted: Callable[[Layout], bool] = lambda _: True) -> list[Candidate]:
        """Every layout of the space that `wanted` lets through, one candidate each: that of the chunk that carries most."""
        return self.of_layouts(layout for layout in self.layouts if wanted(layout))

    def of_layouts(self, layouts: Iterable[Layout]) -> list[Candidate]:
        """A candidate of each. Layouts beside each other are similar, and so are their loads."""
        found, near = [], 1
        for layout in layouts:
            c = self.of_chunks(layout, near)
            near = c.best.concurrency // layout.pp if c.best else near
            found.append(c)
        return found

    def of_chunks(self, layout: Layout, near: int = 1) -> Candidate:
        """The layout with the chunk that carries most at the loads tried; others that may carry more are its rivals."""
        chunks = self.chunks()
        first = self.candidate(layout, chunks[0], near)  # the smallest activations: where it does not fit, none does
        near = first.best.concurrency // layout.pp if first.best else near
        found = [first, *(self.candidate(layout, c, near) for c in chunks[1:])] if first.fits else [first]
        best = max(found, key=lambda c: (c.rate, c.fits > 0, -c.chunk))
        rivals = tuple(c for c in found if c is not best and c.bound > best.rate)
        return replace(best, rivals=rivals, bound=max(c.bound for c in found)) if rivals else best

    def order(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Those that keep the promises at the rate asked for, the best first."""
        rate = self.work.rate

        def key(c: Candidate, each: float) -> tuple[float, float, Layout] | None:
            count = c.needed(rate, each)
            return (count * c.devices if rate is not None else 0, -each * count, c.layout) if count else None

        return self._best_first(candidates, key)

    def nearest(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Those that fit in memory: first by the load that the whole cluster carries within the promises, then those that break
        them under any load, by how far."""
        fitting = [c for c in candidates if c.fits]
        keeping = self._best_first(fitting, lambda c, each: (-each * c.at_most, c.layout) if each else None)
        return keeping + sorted((c for c in fitting if not c.bound), key=lambda c: (self.excess(c), c.layout))

    def _best_first(self, candidates: Iterable[Candidate], key: Callable[[Candidate, float], Any]) -> list[Candidate]:
        """Candidates in the order of `key` (given what a deployment carries; None leaves it out), the first ones with exact loads.

        A key must not fall where a deployment carries less: then one with an exact load that comes first by the bounds of the others
        is before them whatever their loads are.
        """
        waiting = [(key(c, c.bound), i, False, c) for i, c in enumerate(candidates)]
        waiting = [each for each in waiting if each[0] is not None]
        heapify(waiting)
        found: list[Candidate] = []
        while waiting and len(found) < EXACT:
            _, i, exact, c = heappop(waiting)
            if exact:
                found.append(c)
                continue
            c = self.refined(c)
            if (after := key(c, c.rate)) is not None:
                heappush(waiting, (after, i, True, c))
        rest = [(k, i, c) for _, i, _, c in waiting if (k := key(c, c.rate)) is not None]
        return found + [c for _, _, c in sorted(rest, key=lambda each: each[:2])]

    def excess(self, c: Candidate) -> float:
        """The worst of predicted / promised for a single request."""
        return max(self.work.excess(self.replica(c.layout, c.chunk).at(1)))

    def loaded(self, c: Candidate, count: int) -> Point:
        """One replica's load when `count` deployments share the rate. Without a rate, the smallest load that makes nearly the most
        within the promises; where they cannot carry the rate, the largest that keeps them; a single request where none does."""
        replica, rate = self.replica(c.layout, c.chunk), self.work.rate
        if c.best is None:
            return replica.at(1)
        if rate is None:
            return self.at_rate(replica, c.best.concurrency, ENOUGH * c.best.rate)
        if c.best.rate < rate / (count * c.layout.dp):
            return c.best
        return self.at_rate(replica, c.best.concurrency, rate / (count * c.layout.dp))


def last_good(bad: Callable[[int], bool], count: int, guess: int) -> int:
    """The last of `count` indices that is not bad, -1 where all are; `bad` stays true once it is. Few calls where the guess is near."""
    low, high, step = -1, count, 1
    i = min(guess, count - 1)
    while high - low > 1:
        if bad(i):
            high, beyond = i, i - step
        else:
            low, beyond = i, i + step
        step *= 2
        i = beyond if low < beyond < high else (low + high) // 2
    return low


def request_blocks(tokens: int, layout: Layout) -> int:
    """KV blocks of one request on each rank: context ranks share its tokens out, block by block."""
    return -(-tokens // (BLOCK_TOKENS * layout.cp * layout.dcp))


def loads(pp: int, fits: int) -> list[int]:
    """Numbers of requests at once that are tried: full micro-batches, up to what fits."""
    sizes = {1, *(pp * b for b in BATCHES if pp * b <= fits)}
    return sorted(sizes)
