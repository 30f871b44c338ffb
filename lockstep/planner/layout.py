"""One way to split a model over devices, and where its groups lie on the nodes. Pure arithmetic.

Ranks are placed as `distributed.topology` places them: TP fastest, then context, pipeline, data; EP spans data x context x TP
of one pipeline stage. Nodes take ranks in runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, order=True)
class Layout:
    """Sizes of the axes. `dp` counts all replicas; `ep` > 1 places whole experts, over ep / (tp * cp) replicas that step together.

    cp: ranks that share one prompt and its KV cache, beside each other (they multiply devices). dcp: of the TP ranks, how many
    share the KV cache of one request instead of each keeping the same KV heads (no devices of their own).
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1
    dcp: int = 1

    def __post_init__(self) -> None:
        assert min(self.tp, self.pp, self.dp, self.ep, self.cp, self.dcp) >= 1, self
        assert self.tp % self.dcp == 0, self
        assert self.ep == 1 or (self.ep % self.stage_size == 0 and self.dp % (self.ep // self.stage_size) == 0), self

    @property
    def stage_size(self) -> int:
        """Devices of one pipeline stage of one replica."""
        return self.tp * self.cp

    @property
    def replica_size(self) -> int:
        """Devices of one replica."""
        return self.stage_size * self.pp

    @property
    def devices(self) -> int:
        return self.replica_size * self.dp

    @property
    def group_replicas(self) -> int:
        """Replicas that step together because they share experts; 1 without expert parallelism."""
        return self.ep // self.stage_size if self.ep > 1 else 1

    @property
    def deployments(self) -> int:
        """Groups of replicas that know nothing of each other."""
        return self.dp // self.group_replicas

    def __str__(self) -> str:
        sizes = (("TP", self.tp), ("PP", self.pp), ("DP", self.dp), ("EP", self.ep), ("CP", self.cp), ("DCP", self.dcp))
        return " x ".join(f"{name}={size}" for name, size in sizes if size > 1) or "one device"


class Span(NamedTuple):
    """How a group lies on nodes: so many of its ranks on each of so many nodes."""

    ranks_per_node: int
    nodes: int

    @property
    def size(self) -> int:
        return self.ranks_per_node * self.nodes

    @classmethod
    def run(cls, size: int, devices_per_node: int) -> Span:
        """A group of `size` consecutive ranks, on a node border."""
        return cls(size, 1) if size <= devices_per_node else cls(devices_per_node, -(-size // devices_per_node))


def tp_span(layout: Layout, devices_per_node: int) -> Span:
    """The TP group: consecutive ranks."""
    return Span.run(layout.tp, devices_per_node)


def cp_span(layout: Layout, devices_per_node: int) -> Span:
    """The context group: one rank of each of `cp` TP groups beside each other."""
    inside = max(1, min(layout.cp, devices_per_node // layout.tp))
    return Span(inside, -(-layout.cp // inside))


def ep_span(layout: Layout, devices_per_node: int) -> Span:
    """The expert group: the same stage of `group_replicas` replicas."""
    stage, replica = layout.stage_size, layout.replica_size
    if stage >= devices_per_node:
        inside = devices_per_node
    elif replica >= devices_per_node:
        inside = stage
    else:
        inside = devices_per_node // replica * stage
    inside = max(1, min(layout.ep, inside))
    return Span(inside, -(-layout.ep // inside))


def crossings(layout: Layout, devices_per_node: int) -> int:
    """Of the pp - 1 hops between stages, how many lead to another node."""
    stage = layout.stage_size
    return sum((s + 1) * stage // devices_per_node != s * stage // devices_per_node for s in range(layout.pp - 1))
