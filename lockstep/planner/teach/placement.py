"""Tensor parallelism over all nodes against tensor parallelism inside each node with pipeline stages across them.

Both use every rank. TP over n ranks reads 1/n of the weights and pays two all-reduces per layer over all n; TP inside a node of r
pays them inside and hands the residual stream on between nodes, but a step passes the stages one after the other, so
reading takes as long as with r ranks. Which one is faster is arithmetic on the two links, and comes out either way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

from lockstep.planner.teach.links import Line, Wire, lines
from lockstep.planner.teach.roofline import weights_s
from lockstep.planner.teach.table import table, time_text

MOST_TOKENS = 1 << 14


@dataclass(frozen=True)
class Model:
    """What a step of a dense model in 16 bits asks of a rank's memory (bytes/s), units (operations/s) and links."""

    hidden: int
    layers: int
    weight_bytes: float
    bandwidth: float
    flops: float


@dataclass(frozen=True)
class Split:
    """One step's time by term."""

    weights_s: float
    all_reduce_s: float
    hop_s: float

    @property
    def total_s(self) -> float:
        return self.weights_s + self.all_reduce_s + self.hop_s


@dataclass(frozen=True)
class Placement:
    """Both splits for every number of tokens, and where the answer changes."""

    nodes: int
    per_node: int
    tokens: tuple[int, ...]
    over_all: tuple[Split, ...]  # TP = nodes x per_node
    inside: tuple[Split, ...]  # TP = per_node, PP = nodes
    staged_first: bool  # whether the staged split is the faster one at 1 token
    crossover_tokens: int | None  # the fewest tokens at which the faster one is another than at 1 token
    flip_step_s: float | None  # a step between nodes must be below this for TP over all to be as fast at 1 token


def best_s(found: dict[str, Line], size_bytes: int) -> float:
    """The fastest algorithm's seconds; 0 for a single rank."""
    return min((float(line.seconds(size_bytes)) for line in found.values()), default=0.0)


def over_all(model: Model, nodes: int, per_node: int, inside: Wire, between: Wire, tokens: int) -> Split:
    """A step with TP over every rank."""
    size, n = 2 * model.hidden * tokens, nodes * per_node
    took = best_s(lines(nodes, per_node, inside, between), size)
    return Split(_weights(model, n, tokens), 2 * model.layers * took, 0.0)


def staged(model: Model, nodes: int, per_node: int, inside: Wire, between: Wire, tokens: int) -> Split:
    """A step with TP inside each node, which passes the nodes as pipeline stages; each rank hands its copy to its peer."""
    size = 2 * model.hidden * tokens
    took = best_s(lines(1, per_node, inside, between), size) if per_node > 1 else 0.0
    hop = float(between.p2p().seconds(size))
    return Split(_weights(model, per_node, tokens), 2 * model.layers * took, (nodes - 1) * hop)


def _weights(model: Model, ranks: int, tokens: int) -> float:
    return weights_s(tokens, model.weight_bytes, model.weight_bytes / 2, ranks * model.bandwidth, ranks * model.flops)


def place(model: Model, nodes: int, per_node: int, inside: Wire, between: Wire, tokens: tuple[int, ...]) -> Placement:
    """Price both splits, and find where one overtakes the other."""
    links = (inside, between)
    a = tuple(over_all(model, nodes, per_node, *links, count) for count in tokens)
    b = tuple(staged(model, nodes, per_node, *links, count) for count in tokens)
    return Placement(
        nodes,
        per_node,
        tokens,
        a,
        b,
        ahead_s(model, nodes, per_node, inside, between, 1) > 0,
        crossover(model, nodes, per_node, inside, between),
        flip_step_s(model, nodes, per_node, inside, between),
    )


def ahead_s(model: Model, nodes: int, per_node: int, inside: Wire, between: Wire, tokens: int) -> float:
    """By how much the staged split is faster; negative when TP over all ranks is."""
    links = (inside, between)
    return over_all(model, nodes, per_node, *links, tokens).total_s - staged(model, nodes, per_node, *links, tokens).total_s


def crossover(model: Model, nodes: int, per_node: int, inside: Wire, between: Wire) -> int | None:
    """The fewest tokens at which the faster split is not that of 1 token any more; None if there is none up to 16384."""
    first = ahead_s(model, nodes, per_node, inside, between, 1) > 0
    low, high = 1, 1
    while (ahead_s(model, nodes, per_node, inside, between, high) > 0) == first:
        low, high = high, 2 * high
        if high > MOST_TOKENS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        changed = (ahead_s(model, nodes, per_node, inside, between, middle) > 0) != first
        low, high = (low, middle) if changed else (middle, high)
    return high


def flip_step_s(model: Model, nodes: int, per_node: int, inside: Wire, between: Wire) -> float | None:
    """The latency between nodes at which both splits take the same at 1 token; None when only the other bandwidth could do it."""

    def ahead(step: Fraction) -> float:
        return ahead_s(model, nodes, per_node, inside, replace(between, step_s=step), 1)

    if nodes == 1 or ahead(inside.step_s) > 0:
        return None
    low, high = inside.step_s, max(between.step_s, inside.step_s)
    while ahead(high) < 0:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if ahead(middle) < 0 else (low, middle)
    return float(low)


def report(placed: Placement) -> str:
    """The comparison as a table, and what would turn it round."""
    n, r, g = placed.nodes * placed.per_node, placed.per_node, placed.nodes
    if g == 1:
        return "one node: there is nothing to place across"
    rows = []
    for tokens, a, b in zip(placed.tokens, placed.over_all, placed.inside, strict=True):
        terms = (a.weights_s, a.all_reduce_s, a.total_s, b.weights_s, b.all_reduce_s + b.hop_s, b.total_s)
        rows.append((tokens, *map(time_text, terms), _winner(placed, a, b)))
    head = ("tokens", f"TP{n}: weights", "comm.", "step", f"TP{r} x PP{g}: weights", "comm.", "step", "faster")
    said = [f"a step of the model: TP over all {n} ranks, or TP inside a node and a pipeline of {g} nodes", table(head, rows)]
    if placed.crossover_tokens is None:
        said.append(f"no crossover up to {MOST_TOKENS} tokens: the same split wins for every one")
    else:
        first, later = (f"TP{n}", f"TP{r} x PP{g}") if not placed.staged_first else (f"TP{r} x PP{g}", f"TP{n}")
        said.append(f"crossover: {first} is faster below {placed.crossover_tokens} tokens, {later} from there on")
    if placed.flip_step_s is not None:
        said.append(f"at 1 token both are equal when a step between nodes takes {time_text(placed.flip_step_s)}")
    said.append(f"With {g} micro-batches in flight the pipeline finishes {g} such steps in that time, TP{n} one.")
    return "\n".join(said)


def _winner(placed: Placement, a: Split, b: Split) -> str:
    return f"TP{placed.nodes * placed.per_node}" if a.total_s < b.total_s else f"TP{placed.per_node} x PP{placed.nodes}"
