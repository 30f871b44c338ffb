"""The space of layouts on a cluster, without those that cannot win.

Left out, and why: depths that leave the largest stage as large as a smaller depth does (more devices, no faster); groups that
do not lie evenly on nodes; context groups that leave a rank fewer than 256 tokens of a prompt; DCP where no rank repeats
another's KV heads.
"""

from __future__ import annotations

from collections.abc import Iterator

from lockstep.planner.hardware import Cluster
from lockstep.planner.layout import Layout
from lockstep.planner.memory import kv_elements
from lockstep.planner.model import ModelShape

TOKENS_PER_CONTEXT_RANK = 256
MOST_CONTEXT = 64


def deployments(shape: ModelShape, cluster: Cluster, input_len: int) -> Iterator[Layout]:
    """Every layout of one deployment: one replica, or the replicas that share experts."""
    for tp in tp_sizes(shape, cluster):
        for cp in powers(min(MOST_CONTEXT, input_len // TOKENS_PER_CONTEXT_RANK, cluster.devices // tp)):
            stage = tp * cp
            if not lies_evenly(stage, cluster.devices_per_node):
                continue
            for pp in depths(shape, cluster.devices // stage):
                if not replica_fits(stage * pp, cluster):
                    continue
                for dcp in (n for n in powers(repeats(shape, tp)) if tp % n == 0):
                    yield Layout(tp, pp, 1, 1, cp, dcp)
                    yield from _with_experts(shape, cluster, tp, pp, cp, dcp)


def _with_experts(shape: ModelShape, cluster: Cluster, tp: int, pp: int, cp: int, dcp: int) -> Iterator[Layout]:
    if shape.moe is None:
        return
    stage = tp * cp
    for replicas in powers(min(shape.moe.experts // stage, replicas_at_once(stage * pp, cluster))):
        if stage * replicas > 1 and deployments_at_once(stage * pp, replicas, cluster):
            yield Layout(tp, pp, replicas, stage * replicas, cp, dcp)


def tp_sizes(shape: ModelShape, cluster: Cluster) -> list[int]:
    """Sizes that divide a node or are whole nodes, up to the model's heads."""
    d, most = cluster.devices_per_node, min(shape.num_heads, shape.intermediate_size, cluster.devices)
    inside = [n for n in range(1, d + 1) if d % n == 0]
    across = [d * n for n in powers(cluster.nodes) if n > 1]
    return [n for n in inside + across if n <= most]


def depths(shape: ModelShape, most: int) -> list[int]:
    """Numbers of stages that each make the largest stage smaller than the one before did."""
    found, largest = [], shape.num_layers + 1
    for pp in range(1, min(most, shape.num_layers) + 1):
        if -(-shape.num_layers // pp) < largest:
            largest = -(-shape.num_layers // pp)
            found.append(pp)
    return found


def repeats(shape: ModelShape, tp: int) -> int:
    """How many TP ranks keep the same part of the KV cache."""
    return max(1, round(tp * kv_elements(shape, tp) / shape.kv_elements_per_token))


def powers(most: int) -> list[int]:
    """1, 2, 4 ... up to `most`."""
    return [1 << i for i in range(max(1, most).bit_length())]


def lies_evenly(stage: int, devices_per_node: int) -> bool:
    """A stage is a part of a node that divides it, or whole nodes."""
    return (devices_per_node % stage if stage <= devices_per_node else stage % devices_per_node) == 0


def replica_fits(size: int, cluster: Cluster) -> bool:
    """A replica is inside a node, or on whole nodes."""
    return size <= cluster.devices and (size <= cluster.devices_per_node or size % cluster.devices_per_node == 0)


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
