"""Seconds of a collective: within a node as measured where it was measured, across nodes in two levels.

`size_bytes` is the whole tensor: what every rank holds before an all-reduce, a reduce-scatter or an all-to-all, and after
an all-gather. Ranks are said as `ranks_per_node` on each of `nodes`.
"""

from __future__ import annotations

from typing import Literal

from lockstep.planner.hardware import Cluster, Link


def _inside(cluster: Cluster, op: str, ranks: int, size_bytes: float, steps: int, traffic: float) -> float:
    """One collective among `ranks` devices of a node, by its own fit for that many ranks or else by the bare link."""
    if ranks <= 1 or size_bytes <= 0:
        return 0.0
    link = cluster.device.collectives.get(op, {}).get(ranks, cluster.intra)
    return link.seconds(size_bytes, traffic, steps)


def _between(link: Link, nodes: int, size_bytes: float, rounds: int) -> float:
    """A ring over `nodes` devices, one of each node: `rounds` passes of (n-1)/n of the data."""
    if nodes <= 1 or size_bytes <= 0:
        return 0.0
    return link.seconds(size_bytes, rounds * (nodes - 1) / nodes * size_bytes, rounds * (nodes - 1))


def all_reduce_s(cluster: Cluster, ranks_per_node: int, nodes: int, size_bytes: float, library: str = "custom") -> float:
    """Inside: launch + knee + 2(n-1)/n * S / B. Across: reduce-scatter inside, all-reduce of each 1/r across, all-gather inside."""
    r = ranks_per_node
    op = "all_reduce" if library == "custom" else f"all_reduce_{library}"
    if nodes == 1:
        return _inside(cluster, op, r, size_bytes, 2 * (r - 1), 2 * (r - 1) / r * size_bytes)
    return (
        reduce_scatter_s(cluster, r, 1, size_bytes)
        + _between(cluster.inter, nodes, size_bytes / r, 2)
        + all_gather_s(cluster, r, 1, size_bytes)
    )


def all_gather_s(cluster: Cluster, ranks_per_node: int, nodes: int, size_bytes: float) -> float:
    """launch + (n-1)/n * S / B; across nodes first between them, then inside."""
    r = ranks_per_node
    inside = _inside(cluster, "all_gather", r, size_bytes, r - 1, (r - 1) / r * size_bytes)
    return inside + _between(cluster.inter, nodes, size_bytes / r, 1)


def reduce_scatter_s(cluster: Cluster, ranks_per_node: int, nodes: int, size_bytes: float) -> float:
    """The all-gather run backwards, with its own constants."""
    r = ranks_per_node
    inside = _inside(cluster, "reduce_scatter", r, size_bytes, r - 1, (r - 1) / r * size_bytes)
    return inside + _between(cluster.inter, nodes, size_bytes / r, 1)


def all_to_all_s(cluster: Cluster, ranks_per_node: int, nodes: int, size_bytes: float) -> float:
    """Each rank sends 1/n of its `size_bytes` to each of n ranks; what leaves the node goes over the outer link at the same time."""
    r, n = ranks_per_node, ranks_per_node * nodes
    inside = _inside(cluster, "all_to_all", r, size_bytes / nodes, r - 1, (r - 1) / n * size_bytes)
    if nodes == 1:
        return inside
    outside = (n - r) / n * size_bytes
    return max(inside, cluster.inter.seconds(outside, outside, nodes - 1))


def p2p_s(cluster: Cluster, size_bytes: float, where: Literal["inside", "between"] = "inside") -> float:
    """One message from a device to another of the same node (`inside`) or of another node (`between`)."""
    link = cluster.device.collectives.get("p2p", {}).get(2, cluster.intra) if where == "inside" else cluster.inter
    return link.seconds(size_bytes, size_bytes)


def dispatch_s(cluster: Cluster, ranks_per_node: int, nodes: int, tokens: int, hidden: int, topk: int, dtype: str = "fp8") -> float:
    """Expert-parallel dispatch: each rank's `tokens` tokens go to the ranks of their `topk` experts."""
    return _expert_exchange(cluster, "dispatch", ranks_per_node, nodes, tokens, hidden, topk, dtype)


def combine_s(cluster: Cluster, ranks_per_node: int, nodes: int, tokens: int, hidden: int, topk: int, dtype: str = "bfloat16") -> float:
    """Expert-parallel combine: the experts' results return to the rank that owns the token."""
    return _expert_exchange(cluster, "combine", ranks_per_node, nodes, tokens, hidden, topk, dtype)


def _expert_exchange(cluster: Cluster, op: str, ranks_per_node: int, nodes: int, tokens: int, hidden: int, topk: int, dtype: str) -> float:
    from lockstep.planner.hardware import DTYPE_BYTES

    size = tokens * hidden * topk * DTYPE_BYTES[dtype]
    fit = cluster.device.collectives.get(f"deepep_{op}", {}).get(nodes)
    return fit.seconds(size, size) if fit else all_to_all_s(cluster, ranks_per_node, nodes, size)
