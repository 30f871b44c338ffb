"""The space of layouts on a cluster, without those that cannot win.

TP is tried at every size up to a node, and over any number of whole nodes; context groups and replicas that share experts are
powers of two. Left out, and why: depths that leave the largest stage as large as a smaller depth does (more devices, no faster);
replicas over nodes that leave devices of them idle, or whose TP or context groups a node's border cuts (each of their sums would
wait for the slower link with ranks to spare inside); context groups that leave a rank fewer than 256 tokens of a prompt; DCP where
its ranks do not all repeat the same KV heads. `lacking` names the one of these rules that refuses an axis.
"""

from __future__ import annotations

from collections.abc import Iterator

from lockstep.planner.hardware import Cluster
from lockstep.planner.layout import Layout
from lockstep.planner.model import ModelShape

TOKENS_PER_CONTEXT_RANK = 256
MOST_CONTEXT = 64


def deployments(shape: ModelShape, cluster: Cluster, input_len: int) -> Iterator[Layout]:
    """Every layout of one deployment: one replica, or the replicas that share experts."""
    for tp in tp_sizes(shape, cluster):
        for cp in powers(min(MOST_CONTEXT, input_len // TOKENS_PER_CONTEXT_RANK, cluster.devices // tp)):
            for pp in depths(shape, cluster.devices // (tp * cp)):
                if not replica_fits(tp, cp, pp, cluster):
                    continue
                for dcp in (n for n in powers(repeats(shape, tp)) if repeats(shape, tp) % n == 0):
                    yield Layout(tp, pp, 1, 1, cp, dcp)
                    yield from _with_experts(shape, cluster, tp, pp, cp, dcp)


def _with_experts(shape: ModelShape, cluster: Cluster, tp: int, pp: int, cp: int, dcp: int) -> Iterator[Layout]:
    stage = tp * cp
    if shape.moe is None or stage > shape.moe.experts:
        return
    for replicas in powers(min(shape.moe.experts // stage, replicas_at_once(stage * pp, cluster))):
        if stage * replicas > 1 and deployments_at_once(stage * pp, replicas, cluster):
            yield Layout(tp, pp, replicas, stage * replicas, cp, dcp)


def tp_sizes(shape: ModelShape, cluster: Cluster) -> list[int]:
    """Every size up to a node, and any number of whole nodes, up to the model's heads."""
    d, most = cluster.devices_per_node, min(shape.num_heads, shape.intermediate_size, cluster.devices)
    return [*range(1, min(d, most) + 1), *range(2 * d, most + 1, d)]


def depths(shape: ModelShape, most: int) -> list[int]:
    """Numbers of stages that each make the largest stage smaller than the one before did."""
    found, largest = [], shape.num_layers + 1
    for pp in range(1, min(most, shape.num_layers) + 1):
        if -(-shape.num_layers // pp) < largest:
            largest = -(-shape.num_layers // pp)
            found.append(pp)
    return found


def repeats(shape: ModelShape, tp: int) -> int:
    """How many TP ranks keep the same part of the KV cache: a latent is on all of them; 1 where their KV heads differ."""
    if shape.mla is not None:
        return tp
    return tp // shape.num_kv_heads if tp % shape.num_kv_heads == 0 else 1


def powers(most: int) -> list[int]:
    """1, 2, 4 ... up to `most`."""
    return [1 << i for i in range(max(1, most).bit_length())]


def lies_evenly(group: int, devices_per_node: int) -> bool:
    """A group of consecutive ranks is a part of a node that divides it, or whole nodes: on no node's border."""
    return (devices_per_node % group if group <= devices_per_node else group % devices_per_node) == 0


def replica_fits(tp: int, cp: int, pp: int, cluster: Cluster) -> bool:
    """A replica is inside a node, or on whole nodes with its TP groups and its stages cut up by no node's border."""
    size, d = tp * cp * pp, cluster.devices_per_node
    return size <= d or (size <= cluster.devices and size % d == 0 and lies_evenly(tp, d) and lies_evenly(tp * cp, d))


def replicas_at_once(size: int, cluster: Cluster) -> int:
    """Replicas of so many devices that the cluster has room for, none of them cut up by a node's border."""
    d = cluster.devices_per_node
    return d // size * cluster.nodes if size <= d else cluster.nodes // (size // d)


def deployments_at_once(size: int, together: int, cluster: Cluster) -> int:
    """Groups of `together` replicas of `size` devices that the cluster has room for; each inside a node, or on whole nodes alike.

    0 where the last of its nodes would hold fewer replicas than the others.
    """
    here = cluster.devices_per_node // size
    if together <= here:
        return here // together * cluster.nodes
    return replicas_at_once(size, cluster) // together if together % max(1, here) == 0 else 0
