"""The grid, checked against its own definition for any sizes."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.distributed.topology import GROUPS, Topology

sizes = st.integers(1, 4)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    tp = draw(st.integers(1, 8))
    dcp = draw(st.sampled_from([d for d in range(1, tp + 1) if tp % d == 0]))
    dp, pp, pcp, external = draw(sizes), draw(sizes), draw(sizes), draw(st.integers(1, 3))
    return Topology(tp * dp * pp * pcp * external, tp=tp, pp=pp, pcp=pcp, dcp=dcp, dp=dp)


@given(topologies())
@settings(max_examples=150, deadline=None)
def test_every_group_kind_partitions_the_world(t):
    for name in GROUPS:
        groups = t.groups(name)
        assert sorted(itertools.chain(*groups)) == list(range(t.world_size))
        assert all(len(group) == t.group_size(name) and group == sorted(group) for group in groups)
        assert [group[0] for group in groups] == sorted(group[0] for group in groups)


@given(topologies(), st.data())
@settings(max_examples=150, deadline=None)
def test_group_of_agrees_with_groups(t, data):
    rank = data.draw(st.integers(0, t.world_size - 1))
    for name in GROUPS:
        mine = t.group_of(name, rank)
        assert mine in t.groups(name) and rank in mine
        assert mine[t.rank_in_group(name, rank)] == rank


@given(topologies(), st.data())
@settings(max_examples=150, deadline=None)
def test_coordinates_and_rank_at_are_inverse(t, data):
    rank = data.draw(st.integers(0, t.world_size - 1))
    at = t.coordinates(rank)
    assert t.rank_at(external_dp=at.external_dp, dp=at.dp, pp=at.pp, pcp=at.pcp, tp=at.tp) == rank
    assert t.worker_rank(rank) == at.pp * t.pcp * t.tp + at.pcp * t.tp + at.tp
    assert at.ep == at.dp * t.pcp * t.tp + at.pcp * t.tp + at.tp == t.rank_in_group("ep", rank)
    assert t.context_rank(rank) == at.pcp * t.dcp + at.dcp
    assert at.dcp == t.rank_in_group("dcp", rank)
    for axis in ("tp", "pp", "pcp", "dp"):
        assert t.rank_in_group(axis, rank) == getattr(at, axis)


@given(topologies())
@settings(max_examples=100, deadline=None)
def test_groups_are_slices_of_the_reshaped_grid(t):
    """The definition of the field, by numpy transposes, up to the order of the groups."""
    grid = np.arange(t.world_size).reshape(-1, t.dp, t.pp, t.pcp, t.tp)
    expected = {
        "tp": grid.reshape(-1, t.tp),
        "dcp": grid.reshape(-1, t.dcp),
        "pcp": grid.transpose(0, 1, 2, 4, 3).reshape(-1, t.pcp),
        "pp": grid.transpose(0, 1, 4, 3, 2).reshape(-1, t.pp),
        "dp": grid.transpose(0, 4, 2, 3, 1).reshape(-1, t.dp),
        "ep": grid.transpose(0, 2, 1, 3, 4).reshape(-1, t.dp * t.pcp * t.tp),
        "eplb": grid.transpose(0, 2, 1, 3, 4).reshape(-1, t.dp * t.pcp * t.tp),
        "inner_dp_world": grid.reshape(-1, t.pp * t.pcp * t.tp),
        "world": grid.reshape(1, -1),
    }
    for name, groups in expected.items():
        assert t.groups(name) == sorted(groups.tolist()), name


@given(topologies(), st.data())
@settings(max_examples=100, deadline=None)
def test_axes_meet_in_one_rank(t, data):
    """Groups of different axes share exactly the rank itself; together the axes of a replica span it."""
    rank = data.draw(st.integers(0, t.world_size - 1))
    for one, other in itertools.combinations(("tp", "pp", "pcp", "dp"), 2):
        assert set(t.group_of(one, rank)) & set(t.group_of(other, rank)) == {rank}
    assert set(t.group_of("dcp", rank)) <= set(t.group_of("tp", rank)) <= set(t.group_of("ep", rank))
    assert t.group_size("ep") * t.pp * t.external_dp == t.world_size == math.prod(t.shape)


@pytest.mark.parametrize(
    "wrong", [{"tp": 3}, {"tp": 16}, {"tp": 4, "dcp": 3}, {"tp": 2, "pp": 2, "dp": 4}, {"pp": 0}, {"tp": -1}, {"dp": True}]
)
def test_sizes_that_cannot_be_are_refused_with_the_rule(wrong):
    with pytest.raises(ValueError, match=r"multiple of|does not divide|at least 1"):
        Topology(8, **wrong)


def test_ten_thousand_ranks_in_under_a_second():
    t = Topology(10_240, tp=8, pp=8, pcp=2, dcp=4, dp=20)
    started = time.perf_counter()
    for name in GROUPS:
        assert sum(map(len, t.groups(name))) == t.world_size
    for rank in range(0, t.world_size):
        t.coordinates(rank)
    for rank in range(0, t.world_size, 100):
        for name in GROUPS:
            t.group_of(name, rank)
    assert time.perf_counter() - started < 1.0
