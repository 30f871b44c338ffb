"""The search: every layout of the space, its memory, the most requests it may run at once within the promises, and the order.

What wins: with a rate, the fewest devices that carry it within the promises, and among those the one that could carry most;
without a rate, the one that carries most on the whole cluster, at the smallest load that does so to 2 %. Layers are priced once
for each (tp, cp, ep) and work, pipelines are sums of them, and the largest load is found by bisection (latencies grow with it):
so 10,000 devices take seconds.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from lockstep.planner import memory
from lockstep.planner.layer import Setting
from lockstep.planner.layout import Layout
from lockstep.planner.load import Point, Replica, Serving, Workload
from lockstep.planner.memory import BLOCK_TOKENS, RankMemory
from lockstep.planner.model import DTYPE_BYTES
from lockstep.planner.space import deployments, replicas_at_once
from lockstep.planner.step import Pricer

CHUNKS = (512, 2048, 8192)
MOST_SEQS = 1024  # of one replica
ENOUGH = 0.98  # of the most requests per second: what a larger batch adds then is latency
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One deployment's layout, prompts in chunks of `chunk`, with what memory and the promises allow."""

    layout: Layout
    chunk: int
    fits: int  # requests of full length in the KV cache of one replica; 0: none, see `lacking`
    lacking: int  # bytes per rank that one request would need more
    best: Point | None  # the largest load of one replica within the promises
    at_most: int  # deployments that the cluster has room for
    devices: int  # that one deployment takes

    @property
    def rate(self) -> float:
        """Requests per second of one deployment, within the promises."""
        return self.best.rate * self.layout.dp if self.best else 0.0

    def needed(self, rate: float | None) -> int:
        """Deployments for `rate`, or all there is room for; 0 where even those cannot carry it."""
        if self.best is None:
            return 0
        if rate is None:
            return self.at_most
        count = max(1, math.ceil(rate / self.rate - 1e-9))
        return count if count <= self.at_most else 0

    def placed(self, count: int) -> Layout:
        """`count` deployments of it."""
        a = self.layout
        return Layout(a.tp, a.pp, a.dp * count, a.ep, a.cp, a.dcp)


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

    def fullest(self, layout: Layout, chunk: int, rows: int) -> tuple[int, RankMemory]:
        """(bytes free for KV, memory) of the rank of the pipeline with room for the fewest tokens."""
        s = self.pricer.setting
        capacity = int(s.device.capacity_bytes * self.memory_share)
        tokens = max(chunk, rows)
        activations = memory.activation_bytes(s.shape, layout, tokens)
        width = memory.kv_elements(s.shape, layout.tp) * DTYPE_BYTES[s.kv_dtype or s.shape.dtype]
        found = []
        for stage in set(self.pricer.stages(layout.pp)):
            routed: dict[bool, int] = {}
            for (kind, _), count in stage.kinds:
                routed[kind] = routed.get(kind, 0) + count
            weights = memory.stage_bytes(s.shape, layout, routed, 0, s.weight_dtype, first=stage.first, last=stage.last)
            buffers = memory.buffer_bytes(s.shape, rows) if stage.last else memory.LIBRARY_BYTES
            rank = RankMemory(weights, int(sum(routed.values()) * width), activations, buffers)
            found.append((capacity - rank.fixed, rank))
        return min(found, key=lambda each: each[0] / each[1].kv_per_token)

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

    def candidate(self, layout: Layout, chunk: int) -> Candidate:
        """The layout's memory and largest load."""
        fits, lacking = self.room(layout, chunk)
        best = self.largest(self.replica(layout, chunk), fits, lambda p: not self.work.misses(p)) if fits else None
        return Candidate(layout, chunk, fits, lacking, best, self.at_most(layout), self.devices(layout))

    def at_most(self, layout: Layout) -> int:
        """Deployments that the cluster has room for."""
        return replicas_at_once(layout.replica_size, self.pricer.setting.cluster) // layout.dp

    def devices(self, layout: Layout) -> int:
        """Devices that one deployment takes."""
        return layout.devices

    def with_setting(self, setting: Setting) -> Search:
        """The same search in another setting."""
        return replace(self, pricer=Pricer(setting))

    def largest(self, replica: Replica, fits: int, good: Callable[[Point], bool]) -> Point | None:
        """The largest load, among a few sizes of batch, that is `good`."""
        sizes = loads(replica.layout.pp, fits)
        points: dict[int, Point] = {}

        def bad(i: int) -> bool:
            points[i] = replica.at(sizes[i])
            return not good(points[i])

        found = bisect_left(range(len(sizes)), True, key=bad) - 1
        return points[found] if found >= 0 else None

    def exact(self, replica: Replica, fits: int, good: Callable[[Point], bool]) -> int:
        """The most requests at once, to one, that are `good`; 0 where one is not."""
        return bisect_left(range(1, fits + 1), True, key=lambda b: not good(replica.at(b)))

    def refined(self, c: Candidate) -> Candidate:
        """The candidate with its largest load to one request; the search tries a few sizes of batch."""
        replica = self.replica(c.layout, c.chunk)
        most = self.exact(replica, c.fits, lambda p: not self.work.misses(p))
        return replace(c, best=replica.at(most)) if most else c

    def at_rate(self, replica: Replica, fits: int, rate: float) -> Point:
        """The smallest load of a replica that makes `rate`, or the largest that it can have."""
        found = bisect_left(range(1, fits + 1), rate, key=lambda b: replica.at(b).rate)
        return replica.at(min(fits, found + 1))

    def chunks(self) -> list[int]:
        """Sizes of chunk that cut this prompt differently."""
        cuts = {-(-self.work.input_len // c): c for c in reversed(CHUNKS)}
        return sorted(cuts.values())

    def all(self, wanted: Callable[[Layout], bool] = lambda _: True) -> list[Candidate]:
        """Every layout of the space that `wanted` lets through, one candidate each: that of the chunk that carries most."""
        s = self.pricer.setting
        return [self.of_chunks(layout) for layout in deployments(s.shape, s.cluster, self.work.input_len) if wanted(layout)]

    def of_chunks(self, layout: Layout) -> Candidate:
        """The layout with the chunk that carries most."""
        chunks = self.chunks()
        first = self.candidate(layout, chunks[0])  # the smallest activations: where it does not fit, none does
        rest = [self.candidate(layout, c) for c in chunks[1:]] if first.fits else []
        return max([first, *rest], key=lambda c: (c.rate, c.fits > 0, -c.chunk))

    def order(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Those that keep the promises at the rate asked for, the best first."""
        rate, good = self.work.rate, []
        for c in candidates:
            count = c.needed(rate)
            if count:
                devices = count * c.devices if rate is not None else 0
                good.append(((devices, -c.rate * count, c.layout), c))
        return [c for _, c in sorted(good, key=lambda each: each[0])]

    def nearest(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Those that fit in memory: first by the load that the whole cluster carries within the promises, then those that break
        them under any load, by how far."""
        fitting = [c for c in candidates if c.fits]
        return sorted(fitting, key=lambda c: (-c.rate * c.at_most, self.excess(c) if c.best is None else 0.0, c.layout))

    def excess(self, c: Candidate) -> float:
        """The worst of predicted / promised for a single request."""
        point = self.replica(c.layout, c.chunk).at(1)
        return max(point.ttft_s / self.work.ttft_limit_s, point.tpot_s / self.work.tpot_limit_s)

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


def request_blocks(tokens: int, layout: Layout) -> int:
    """KV blocks of one request on each rank: context ranks share its tokens out, block by block."""
    return -(-tokens // (BLOCK_TOKENS * layout.cp * layout.dcp))


def loads(pp: int, fits: int) -> list[int]:
    """Numbers of requests at once that are tried: full micro-batches, up to what fits."""
    sizes = {1, *(pp * b for b in BATCHES if pp * b <= fits)}
    return sorted(sizes)
