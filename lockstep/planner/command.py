"""The command that starts a plan, for each node. Our own command line parses every one of them (tests/planner/test_command.py)."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace

from lockstep.planner.layout import Layout

PORT = 8000  # of the first server on a node; the others' follow
# Listening for other machines asks for a key; where the variable is not set, the server refuses the empty one and does not start.
OPEN = ' --host 0.0.0.0 --api-key "$LOCKSTEP_API_KEY"'


@dataclass(frozen=True)
class Limits:
    """The batch limits of every replica, as the flags say them."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


@dataclass(frozen=True)
class Command:
    """What to type on one node."""

    node: str
    line: str


def commands(
    model: str, layout: Layout, limits: Limits, hosts: list[str], devices_per_node: int, *, quantization: str = "", share: float = 0.9
) -> list[Command]:
    """One command for each server and each node that helps it. `hosts`: names or addresses of all nodes, in order.

    On one node the server listens to that node alone; on several, to whoever has the key.
    """
    found = _on_nodes(model, layout, limits, hosts, devices_per_node, quantization, share)
    alone = len({command.node for command in found}) == 1
    return [replace(command, line=command.line.removesuffix(OPEN)) for command in found] if alone else found


def _on_nodes(
    model: str, layout: Layout, limits: Limits, hosts: list[str], devices_per_node: int, quantization: str, share: float
) -> list[Command]:
    common = ["lockstep", "serve", model, *_axes(layout), *_limits(limits, share)]
    if quantization == "int8":
        common += ["--quantization", "int8"]
    if layout.replica_size > devices_per_node:
        return _spanning(common, layout, hosts, layout.replica_size // devices_per_node)
    per_node = devices_per_node // layout.replica_size
    if layout.deployments == 1 or layout.ep == 1:
        return _replicas(common, layout.dp, per_node, hosts)
    return _groups(common, layout, per_node, hosts)


def _axes(layout: Layout) -> list[str]:
    """The flags of every axis but data."""
    words: list[str] = []
    for flag, size in (("-tp", layout.tp), ("-pp", layout.pp), ("-pcp", layout.cp), ("-dcp", layout.dcp)):
        words += [flag, str(size)] if size > 1 else []
    words += ["--pipeline-layer-partition", "even"] if layout.pp > 1 else []
    return words + (["-ep"] if layout.ep > 1 else [])


def _limits(limits: Limits, share: float) -> list[str]:
    return [
        *("--max-num-seqs", str(limits.max_num_seqs)),
        *("--max-num-batched-tokens", str(limits.max_num_batched_tokens)),
        *("--max-model-len", str(limits.max_model_len)),
        *("--gpu-memory-utilization", f"{share:g}"),
    ]


def _spanning(common: list[str], layout: Layout, hosts: list[str], nodes: int) -> list[Command]:
    """Replicas of several nodes each: one server for all of them, or one for those that share experts."""
    together = layout.dp if layout.ep == 1 else layout.group_replicas
    data = ["-dp", str(together)] if together > 1 else []
    found = []
    for first in range(0, layout.dp * nodes, together * nodes):
        group = hosts[first : first + together * nodes]
        for rank, host in enumerate(group):
            place = ["--nnodes", str(len(group)), "--node-rank", str(rank), "--master-addr", group[0]]
            found.append(_command(host, [*common, *data, *place, *(["--headless"] if rank else [])], leader=rank == 0))
    return found


def _replicas(common: list[str], replicas: int, per_node: int, hosts: list[str]) -> list[Command]:
    """Replicas that each fit in a node: one server, and the other nodes keep replicas for it."""
    if replicas == 1:
        return [_command(hosts[0], common, leader=True)]
    data = ["-dp", str(replicas)]
    if replicas <= per_node:
        return [_command(hosts[0], [*common, *data], leader=True)]
    found = []
    for i, start in enumerate(range(0, replicas, per_node)):
        here = min(per_node, replicas - start)
        place = ["-dpl", str(here), "-dpa", hosts[0], *(["-dpr", str(start), "--headless"] if start else [])]
        found.append(_command(hosts[i], [*common, *data, *place], leader=start == 0))
    return found


def _groups(common: list[str], layout: Layout, per_node: int, hosts: list[str]) -> list[Command]:
    """Replicas that share experts in groups: a server for each group, several of them on a node where they are small."""
    found, here = [], max(1, per_node // layout.group_replicas)
    nodes = -(-layout.group_replicas // per_node)
    for i in range(layout.deployments):
        first = i // here if nodes == 1 else i * nodes
        group = _replicas(common, layout.group_replicas, per_node, hosts[first : first + nodes])
        shared = here > 1 and layout.deployments > 1
        found += [_beside(c, i % here, layout.replica_size * layout.group_replicas) for c in group] if shared else group
    return found


def _beside(command: Command, i: int, devices: int) -> Command:
    """The command of the i-th server on a node: each has devices and a port of its own."""
    mine = ",".join(str(d) for d in range(i * devices, (i + 1) * devices))
    return Command(command.node, f"CUDA_VISIBLE_DEVICES={mine} {command.line} --port {PORT + i}")


def _command(host: str, words: list[str], *, leader: bool) -> Command:
    return Command(host, shlex.join(words) + OPEN * leader)
