"""Expert parallelism under skew: the fullest rank sets the pace, and what spreading the popular experts does about it.

A mixture of experts sends each token to its `topk` experts; with expert parallelism a rank holds whole experts, and a layer lasts
until the rank with the most tokens is done. Experts are never equally popular: here the k-th most popular is picked as 1 / k^zipf.

The remedy is that of DeepSeek's EPLB (its `global` policy), told in its steps:
1. replicate: as often as there are redundant slots, give one to the expert with the most tokens per replica;
2. pack: replicas in the order of their load, each to the least loaded rank that has a slot free.
It sees the tokens of one window and is used for the next, so that chance which does not repeat is no help.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.config.errors import ConfigError
from lockstep.config.tree import opt
from lockstep.planner.teach.checks import within
from lockstep.planner.teach.svg import COLOURS, IDLE, Canvas
from lockstep.planner.teach.table import percent, table


@dataclass(frozen=True)
class Options:
    """Which layer, how skewed, and how many slots to spare."""

    experts: int = opt(64, "Experts of the layer.")
    topk: int = opt(4, "Experts that each token is sent to.")
    ranks: int = opt(8, "Ranks that share the experts.", "-ep")
    redundant: int = opt(8, "Slots beyond one for each expert.")
    tokens: int = opt(2048, "Tokens in each of the two windows.")
    zipf: float = opt(0.8, "How skewed: 0 is equally popular, 1 is strong.")
    seed: int = opt(0, "Of the tokens' choices, and of which expert is popular.")

    def check(self) -> None:
        """Raises ConfigError for a layer that cannot be."""
        within("experts", self.experts, 2, 512)
        within("topk", self.topk, 1, 512)
        within("ranks", self.ranks, 2, 512)
        within("redundant", self.redundant, 0, 512)
        within("tokens", self.tokens, 1, 8192)
        within("zipf", self.zipf, 0, 3)
        for needed, why in ((self.topk, "each token is sent to (topk)"), (self.ranks, "ranks need, one each (ranks)")):
            if needed > self.experts:
                raise ConfigError(f"experts={self.experts} are fewer than the {needed} that {why}: take more experts, or fewer of those.")
        for name, slots in (("experts", self.experts), ("redundant", self.redundant)):
            if slots % self.ranks:
                low = slots // self.ranks * self.ranks
                near = f"{low} or {low + self.ranks}" if low or name == "redundant" else str(self.ranks)
                raise ConfigError(f"{name}={slots} cannot be shared evenly by {self.ranks} ranks (ranks): take {near}, or other ranks.")


@dataclass(frozen=True)
class Placed:
    """Where replicas sit, and how many tokens that gives each rank in the second window."""

    name: str
    slots: tuple[tuple[int, ...], ...]  # expert ids of each rank
    rank_tokens: tuple[float, ...]

    @property
    def max_over_mean(self) -> float:
        """1 is perfect; a layer lasts so many times as long as it would with even ranks."""
        return max(self.rank_tokens) * len(self.rank_tokens) / sum(self.rank_tokens)


@dataclass(frozen=True)
class Result:
    """How popular the experts were, and three ways to place them."""

    options: Options
    seen: tuple[int, ...]  # tokens of each expert in the first window
    later: tuple[int, ...]  # and in the second
    placed: tuple[Placed, ...]
    by_redundant: tuple[tuple[int, float], ...]  # (redundant slots, max over mean in the second window)


def choices(options: Options, window: int) -> tuple[int, ...]:
    """Tokens of each expert in one window. A token's experts differ from each other.

    Drawn without replacement: each expert gets the key log(u) / weight, the largest `topk` win (Efraimidis and Spirakis, 2006).
    """
    o = options
    order = list(range(o.experts))
    random.Random(o.seed).shuffle(order)
    weight = [0.0] * o.experts
    for place, expert in enumerate(order, 1):
        weight[expert] = place**-o.zipf
    draw = random.Random(1 + 2 * o.seed + window).random
    counts = [0] * o.experts
    for _ in range(o.tokens):
        keys = [math.log(1.0 - draw()) / w for w in weight]
        for expert in heapq.nlargest(o.topk, range(o.experts), key=keys.__getitem__):
            counts[expert] += 1
    return tuple(counts)


def replicate(load: Sequence[float], slots: int) -> list[int]:
    """Replicas of each expert, at least one: every further slot goes to the expert with the most load per replica."""
    assert slots >= len(load), "a slot for each expert"
    counts = [1] * len(load)
    heap = [(-one, expert) for expert, one in enumerate(load)]
    heapq.heapify(heap)
    for _ in range(slots - len(load)):
        _, expert = heap[0]
        counts[expert] += 1
        heapq.heapreplace(heap, (-load[expert] / counts[expert], expert))
    return counts


def pack(load: Sequence[float], counts: Sequence[int], ranks: int) -> list[list[int]]:
    """The expert ids of every rank's slots: the heaviest replica first, to the least loaded rank with a slot free."""
    replicas = sorted(((load[e] / n, e) for e, n in enumerate(counts) for _ in range(n)), key=lambda pair: (-pair[0], pair[1]))
    room = len(replicas) // ranks
    held: list[list[int]] = [[] for _ in range(ranks)]
    carried = [0.0] * ranks
    for one, expert in replicas:
        rank = min((r for r in range(ranks) if len(held[r]) < room), key=lambda r: (carried[r], r))
        held[rank].append(expert)
        carried[rank] += one
    return held


def rank_tokens(slots: Sequence[Sequence[int]], load: Sequence[float]) -> tuple[float, ...]:
    """Tokens of every rank when an expert's tokens are shared evenly by its replicas."""
    counts = [0] * len(load)
    for held in slots:
        for expert in held:
            counts[expert] += 1
    return tuple(sum(load[expert] / counts[expert] for expert in held) for held in slots)


def balance(seen: Sequence[float], redundant: int, ranks: int) -> list[list[int]]:
    """Both steps of the remedy, from the tokens that were seen."""
    return pack(seen, replicate(seen, len(seen) + redundant), ranks)


def simulate(options: Options) -> Result:
    """Draw two windows, place by the first, measure in the second. Raises ConfigError for impossible settings."""
    options.check()
    o = options
    seen, later = choices(o, 0), choices(o, 1)
    share = o.experts // o.ranks
    in_order = [list(range(r * share, (r + 1) * share)) for r in range(o.ranks)]
    ways = {"in order": in_order, "packed": balance(seen, 0, o.ranks), f"{o.redundant} replicas": balance(seen, o.redundant, o.ranks)}
    placed = tuple(Placed(name, tuple(map(tuple, slots)), rank_tokens(slots, later)) for name, slots in ways.items())
    steps = range(0, max(o.redundant, o.experts) + 1, o.ranks)
    curve = tuple((r, Placed("", (), rank_tokens(balance(seen, r, o.ranks), later)).max_over_mean) for r in steps)
    return Result(o, seen, later, placed, curve)


def report(result: Result) -> str:
    """How popular the experts are, the three placements, and what further replicas bring."""
    o, total = result.options, sum(result.seen)
    first = sorted(result.seen, reverse=True)
    top = max(1, o.experts // 10)
    rows = [
        (
            p.name,
            len(p.slots[0]),
            f"{min(p.rank_tokens):.0f}",
            f"{max(p.rank_tokens):.0f}",
            f"{p.max_over_mean:.3f}",
            percent(1 / p.max_over_mean),
        )
        for p in result.placed
    ]
    replicas = replicate(result.seen, o.experts + o.redundant)
    many = sorted(((n, -e) for e, n in enumerate(replicas) if n > 1), reverse=True)[:8]
    listed = ", ".join(f"expert {-e}: {n}" for n, e in many) or "none"
    curve = [(r, f"{ratio:.3f}", percent(r / o.experts)) for r, ratio in result.by_redundant]
    return "\n".join(
        [
            f"{o.experts} experts on {o.ranks} ranks, {o.topk} for each of {o.tokens} tokens, popular as 1/k^{o.zipf:g}",
            f"the {top} most popular get {percent(sum(first[:top]) / total)} of the tokens (evenly: {percent(top / o.experts)})",
            "",
            table(("placed", "slots per rank", "least tokens", "most", "max / mean", "busy on average"), rows),
            "",
            f"replicas beyond one, of {o.redundant}: {listed}{' ...' if len(many) == 8 else ''}",
            "",
            "max / mean by redundant slots, and what they add to the experts' memory",
            table(("slots", "max / mean", "memory"), curve),
        ]
    )


def picture(result: Result) -> str:
    """Tokens of every rank, for each placement, against the mean."""
    canvas = Canvas(860, 300, f"{result.options.experts} experts on {result.options.ranks} ranks: tokens by rank")
    most = max(max(p.rank_tokens) for p in result.placed)
    wide, tall = 250.0, 170.0
    for number, p in enumerate(result.placed):
        left = 30 + number * (wide + 25)
        canvas.text(left, 58, f"{p.name}: max / mean {p.max_over_mean:.2f}", kind="b")
        canvas.rect(left, 70, wide, tall, IDLE)
        bar = wide / len(p.rank_tokens)
        for rank, tokens in enumerate(p.rank_tokens):
            high = tall * tokens / most
            canvas.rect(left + rank * bar + 1, 70 + tall - high, bar - 2, high, COLOURS[number], f"rank {rank}: {tokens:.0f} tokens")
            if bar >= 14:
                canvas.text(left + (rank + 0.5) * bar, 70 + tall + 16, rank, anchor="middle", kind="s")
        mean = 70 + tall * (1 - sum(p.rank_tokens) / len(p.rank_tokens) / most)
        canvas.line(left, mean, left + wide, mean, kind="a")
    canvas.text(30, 282, "The line is the mean; a layer lasts as long as its fullest rank.", kind="s")
    return canvas.svg()
