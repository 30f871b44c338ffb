"""Where groups lie on nodes: compared with the ranks that the engine's topology names."""

import itertools

import pytest

from lockstep.distributed.topology import Topology
from lockstep.planner.catalogue import cluster
from lockstep.planner.find import find_model
from lockstep.planner.layout import Layout, Span, cp_span, crossings, ep_span, tp_span
from lockstep.planner.space import deployments, depths, replicas_at_once

LAYOUTS = [
    Layout(tp, pp, dp, ep, cp)
    for tp, pp, dp, cp in itertools.product((1, 2, 4, 8, 16), (1, 2, 4), (1, 2, 4), (1, 2))
    for ep in {1, tp * cp * dp}
    if tp * cp <= 8 or tp * cp % 8 == 0
    if tp * cp * pp <= 8 or tp * cp * pp % 8 == 0
]  # fmt: skip


def lies(ranks: list[int], devices_per_node: int) -> Span:
    """The span of the ranks of a group, counted."""
    nodes = [rank // devices_per_node for rank in ranks]
    return Span(max(nodes.count(node) for node in set(nodes)), len(set(nodes)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_spans_are_those_of_the_topology(layout):
    grid = Topology(layout.devices, tp=layout.tp, pp=layout.pp, pcp=layout.cp, dp=layout.dp)
    assert tp_span(layout, 8) == lies(grid.group_of("tp", 0), 8)
    assert cp_span(layout, 8) == lies(grid.group_of("pcp", 0), 8)
    if layout.ep > 1:
        assert ep_span(layout, 8) == lies(grid.group_of("ep", 0), 8)
    stages = grid.group_of("pp", 0)
    assert crossings(layout, 8) == sum(a // 8 != b // 8 for a, b in itertools.pairwise(stages))


def test_depths_leave_out_those_that_make_no_stage_smaller():
    shape = find_model("llama-3.1-70b")[0]
    found = depths(shape, 80)
    sizes = [-(-80 // pp) for pp in found]
    assert found[:5] == [1, 2, 3, 4, 5] and found[-1] == 80 and sizes == sorted(set(sizes), reverse=True)


@pytest.mark.parametrize(("model", "where"), [("llama-3.1-70b", "2x8xH100"), ("qwen3-235b-a22b", "4x8xH100"), ("deepseek-v3", "8x8xH100")])
def test_the_space_has_every_axis_and_nothing_twice(model, where):
    shape, machines = find_model(model)[0], cluster(where)
    found = list(deployments(shape, machines, 2000))
    assert len(found) == len(set(found))
    axes = ("tp", "pp", "cp") + (("ep",) if shape.moe else ())
    for axis in axes:
        assert {getattr(layout, axis) for layout in found} - {1}, axis
    assert any(layout.tp > machines.devices_per_node for layout in found)
    for layout in found:
        assert replicas_at_once(layout.replica_size, machines) >= layout.dp
        assert layout.devices <= machines.devices
