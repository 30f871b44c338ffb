"""Seconds of a collective: within a node as measured where it was measured, across nodes in two levels.

`size_bytes` is the whole tensor: what every rank holds before an all-reduce, a reduce-scatter or an all-to-all, and after
an all-gather. Ranks are said as `ranks_per_node` on each of `nodes`.
"""

from __future__ import annotations

import math
from typing import Literal

from lockstep.planner.hardware import DTYPE_BYTES, Cluster, Device, Link

# How often a collective passes (n-1)/n of its data on, in n-1 steps each time: once to scatter sums, once to gather them.
ROUNDS = {"all_reduce": 2, "all_reduce_nccl": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}

BETWEEN = "p2p between nodes"  # the family of one message over the device's own outer link


def measured_s(device: Device, op: str, ranks: int, size_bytes: float) -> float:
    """Seconds by the device's own constants for `op` among `ranks`; KeyError where there are none."""
    link = device.collectives[op][ranks]
    if size_bytes <= 0:
        return 0.0
    if op in ROUNDS:
        seconds = ring_s(link, ranks, size_bytes, ROUNDS[op])
    else:  # a message, or an exchange whose size is what one rank sends
        seconds = link.seconds(size_bytes, size_bytes)
    return device.corrected(f"{op} n={ranks}", seconds, size_bytes)


def ring_s(link: Link, ranks: int, size_bytes: float, rounds: int) -> float:
    """`rounds` passes of (n-1)/n of the data around n ranks."""
    if ranks <= 1 or size_bytes <= 0:
        return 0.0
    return link.seconds(size_bytes, rounds * (ranks - 1) / ranks * size_bytes, rounds * (ranks - 1))


def _inside(cluster: Cluster, op: str, ranks: int, size_bytes: float) -> float:
    """One collective among `ranks` devices of a node: by its own constants for that many ranks, between those of fewer and of more,
    or else by the bare link."""
    if ranks <= 1 or size_bytes <= 0:
        return 0.0
    counts = cluster.device.collectives.get(op, {})
    if ranks in counts:
        return measured_s(cluster.device, op, ranks, size_bytes)
    below, above = max((n for n in counts if n < ranks), default=0), min((n for n in counts if n > ranks), default=0)
    if below and above:  # 3 ranks are between 2 and 4, not what a bare link would make of them
        fewer, more = (measured_s(cluster.device, op, n, size_bytes) for n in (below, above))
        return fewer * math.pow(more / fewer, math.log(ranks / below) / math.log(above / below))
    ring = ring_s(cluster.intra, ranks, size_bytes, ROUNDS[op])
    return min(ring, *direct_s(cluster.intra, ranks, size_bytes)) if op == "all_reduce" else ring


def direct_s(link: Link, ranks: int, size_bytes: float) -> tuple[float, float]:
    """All-reduce without a ring, where each rank reaches each other at once: (one-shot, two-shot).

    One-shot: everybody reads everything, in one step. Two-shot: a reduce-scatter and an all-gather of a step each.
    """
    one = link.seconds(size_bytes, (ranks - 1) * size_bytes, 1)
    return one, link.seconds(size_bytes, 2 * (ranks - 1) / ranks * size_bytes, 2)


def across_s(link: Link, nodes: int, size_bytes: float) -> float:
    """All-reduce over nodes: a ring, or for small messages on many nodes a tree up and down."""
    tree = link.seconds(size_bytes, 2 * size_bytes, 2 * math.ceil(math.log2(nodes)))
    return min(ring_s(link, nodes, size_bytes, 2), tree)


def all_reduce_s(cluster: Cluster, ranks_per_node: int, nodes: int, size_bytes: float) -> float:
    """Inside: launch + knee + 2(n-1)/n * S / B. Across: reduce-scatter inside, all-reduce of each 1/r across, all-gather inside."""
    r = ranks_per_node
    if nodes == 1:
        return _inside(cluster, "all_reduce", r, size_bytes)
    scatter, gather = reduce_scatter_s(cluster, r, 1, size_bytes), all_gather_s(cluster, r, 1, size_bytes)
    return scatter + across_s(cluster.inter, nodes, size_bytes / r) + gather


def all_gather_s(cluster: Cluster, ranks_per_node: int, nodes: int, size_bytes: float) -> float:
    """launch + (n-1)/n * S / B; across nodes first between them, then inside."""
    r = ranks_per_node
    inside = _inside(cluster, "all_gather", r, size_bytes)
    return inside + ring_s(cluster.inter, nodes, size_bytes / r, 1)


def reduce_scatter_s(cluster: Cluster, ranks_per_node: int, nodes: int, size_bytes: float) -> float:
    """The all-gather run backwards, with its own constants."""
    r = ranks_per_node
    inside = _inside(cluster, "reduce_scatter", r, size_bytes)
    return inside + ring_s(cluster.inter, nodes, size_bytes / r, 1)


def all_to_all_s(cluster: Cluster, ranks_per_node: int, nodes: int, size_bytes: float) -> float:
    """Each rank sends 1/n of its `size_bytes` to each of n ranks, at once; what leaves the node goes over the outer link meanwhile."""
    r, n = ranks_per_node, ranks_per_node * nodes
    inside = _inside(cluster, "all_to_all", r, size_bytes / nodes)
    if nodes == 1:
        return inside
    outside = (n - r) / n * size_bytes
    return max(inside, cluster.inter.seconds(outside, outside))


def p2p_s(cluster: Cluster, size_bytes: float, where: Literal["inside", "between"] = "inside") -> float:
    """One message from a device to another of the same node (`inside`) or of another node (`between`)."""
    if where == "inside" and "p2p" in cluster.device.collectives:
        return measured_s(cluster.device, "p2p", 2, size_bytes)
    return cluster.intra.seconds(size_bytes, size_bytes) if where == "inside" else between_s(cluster.device, cluster.inter, size_bytes)


def between_s(device: Device, link: Link, size_bytes: float) -> float:
    """One message over `link` to another node; samples are those of the device's own link."""
    seconds = link.seconds(size_bytes, size_bytes)
    return device.corrected(BETWEEN, seconds, size_bytes) if link is device.scale_out and size_bytes > 0 else seconds


DEEPEP = {"low_latency": "deepep_", "normal": "deepep_normal_"}
Mode = Literal["low_latency", "normal"]  # kernels for the few tokens of decode, and for the many of prompts


def dispatch_s(
    cluster: Cluster, ranks_per_node: int, nodes: int, tokens: int, hidden: int, topk: int, mode: Mode = "low_latency", dtype: str = "fp8"
) -> float:
    """Expert-parallel dispatch: each rank's `tokens` tokens go to the ranks of their `topk` experts."""
    return _expert_exchange(cluster, DEEPEP[mode] + "dispatch", ranks_per_node, nodes, tokens, hidden, topk, dtype)


def combine_s(
    cluster: Cluster, ranks_per_node: int, nodes: int, tokens: int, hidden: int, topk: int, mode: Mode = "low_latency",
    dtype: str = "bfloat16",
) -> float:  # fmt: skip
    """Expert-parallel combine: the experts' results return to the rank that owns the token."""
    return _expert_exchange(cluster, DEEPEP[mode] + "combine", ranks_per_node, nodes, tokens, hidden, topk, dtype)


def _expert_exchange(cluster: Cluster, op: str, ranks_per_node: int, nodes: int, tokens: int, hidden: int, topk: int, dtype: str) -> float:
    size = tokens * hidden * topk * DTYPE_BYTES[dtype]
    counts = cluster.device.collectives.get(op, {}) if ranks_per_node == cluster.device.per_node else {}
    if nodes in counts:
        return measured_s(cluster.device, op, nodes, size)
    if nodes > 1 and max(counts, default=1) > 1:
        return _of_other_counts(cluster.device, op, nodes, size, topk)
    once = leaving(op, nodes, topk) / leaving(DEEPEP["low_latency"], nodes, topk) if nodes > 1 else 1.0
    return all_to_all_s(cluster, ranks_per_node, nodes, size * once)


def leaving(op: str, nodes: int, topk: int) -> float:
    """Of the `topk` copies of a token, the share that crosses to other nodes: a low-latency exchange sends one to each expert, a
    normal one sends one to each node that has any, and the node passes it on."""
    if op.startswith(DEEPEP["normal"]):
        return (nodes - 1) * (1 - (1 - 1 / nodes) ** topk) / topk
    return (nodes - 1) / nodes


def _of_other_counts(device: Device, op: str, nodes: int, size: float, topk: int) -> float:
    """An exchange over a number of nodes that was not measured: between two that were, on logarithms; beyond the largest (or below the
    smallest), by its constants, with as many more bytes as cross to other nodes."""
    counts = sorted(n for n in device.collectives[op] if n > 1)
    low, high = max((n for n in counts if n < nodes), default=0), min((n for n in counts if n > nodes), default=0)
    if not (low and high):
        near = low or high
        return measured_s(device, op, near, size * leaving(op, nodes, topk) / leaving(op, near, topk))
    share = math.log(nodes / low) / math.log(high / low)
    return math.pow(measured_s(device, op, low, size), 1 - share) * math.pow(measured_s(device, op, high, size), share)
