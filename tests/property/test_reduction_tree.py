"""The tree of additions against its definition, over every way of dealing atoms out."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given as hypothesis_given
from hypothesis import settings
from hypothesis import strategies as st

from lockstep.distributed.partition import shards
from lockstep.distributed.reduction_tree import ADD, ReductionTree, split, subtrees


def given(*strategies):
    """hypothesis without its 200 ms limit per example, which a busy machine breaks."""
    return lambda test: settings(deadline=None)(hypothesis_given(*strategies)(test))


class Term:
    """Addition that remembers its order."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __add__(self, other: Term) -> Term:
        return Term(f"({self.text}+{other.text})")


def definition(lo: int, hi: int) -> str:
    """The node [lo, hi), written out: the cut is the largest power of two below the number of atoms."""
    if hi - lo == 1:
        return str(lo)
    size = 1
    while size * 2 < hi - lo:
        size *= 2
    return f"({definition(lo, lo + size)}+{definition(lo + size, hi)})"


@st.composite
def deals(draw):
    """(atoms, the ranks' runs), ranks without an atom included."""
    total = draw(st.integers(1, 40))
    cuts = sorted(draw(st.lists(st.integers(0, total), max_size=9)))
    bounds = [0, *cuts, total]
    return total, list(pairwise(bounds))


@given(deals())
def test_the_sum_is_the_same_however_atoms_are_dealt_out(deal):
    total, runs = deal
    tree = ReductionTree.of(total, runs)
    leaves = [Term(definition(lo, hi)) for run in runs for lo, hi in subtrees(total, *run)]
    assert tree.evaluate(leaves).text == definition(0, total)
    assert tree.counts == tuple(len(subtrees(total, *run)) for run in runs)


@given(deals())
def test_leaves_are_pushed_in_order_each_once(deal):
    """The kernels rely on it, and on the depth."""
    total, runs = deal
    tree = ReductionTree.of(total, runs)
    assert [op for op in tree.code if op != ADD] == list(range(sum(tree.counts)))
    depth = deepest = 0
    for op in tree.code:
        depth += 1 if op != ADD else -1
        deepest = max(deepest, depth)
    assert depth == 1 and deepest <= 8


@given(st.integers(1, 40), st.data())
def test_subtrees_tile_the_run_and_are_maximal(total, data):
    first = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(first, total))
    nodes = subtrees(total, first, stop)
    assert [a for lo, hi in nodes for a in range(lo, hi)] == list(range(first, stop))
    tree_nodes = set(_nodes(0, total))
    assert set(nodes) <= tree_nodes
    for lo, hi in nodes:  # no node above is inside too
        assert not any(a <= lo and hi <= b and (a, b) != (lo, hi) and first <= a and b <= stop for a, b in tree_nodes)


def _nodes(lo, hi):
    yield lo, hi
    if hi - lo > 1:
        mid = split(lo, hi)
        yield from _nodes(lo, mid)
        yield from _nodes(mid, hi)


def test_powers_of_two_send_one_partial_sum_each():
    """The cheap cases stay cheap: eight atoms over 1, 2, 4 and 8 ranks."""
    for tp in (1, 2, 4, 8):
        runs = [(run.start, run.stop) for run in shards(8, tp)]
        assert ReductionTree.of(8, runs).counts == (1,) * tp
    assert ReductionTree.of(8, [(0, 3), (3, 6), (6, 8)]).counts == (2, 2, 1)


def test_hosts_are_cut_out_of_the_tree():
    """hierarchical.py: each host's subtrees and what is above them give the tree again, for any seating."""
    from random import Random

    from lockstep.distributed.communicators.hierarchical import _plan

    for seed in range(200):
        random = Random(seed)
        world = random.randrange(1, 9)
        seats = [random.randrange(random.choice((1, 2, 3))) for _ in range(world)]
        hosts = [sorted(set(seats), key=seats.index).index(seat) for seat in seats]
        total = random.randrange(1, 20)
        cuts = sorted(random.randrange(total + 1) for _ in range(world - 1))
        runs = list(zip([0, *cuts], [*cuts, total], strict=True))
        tree = ReductionTree.of(total, runs)
        leaves = [[Term(definition(lo, hi)) for lo, hi in subtrees(total, *run)] for run in runs]
        nodes = []
        for host in range(max(hosts) + 1):
            members = [r for r in range(world) if hosts[r] == host]
            plans = [_plan(tree, hosts, r) for r in members]
            for i, local in enumerate(plans[0].local):
                given_leaves = [leaf for r, plan in zip(members, plans, strict=True) for leaf in leaves[r][slice(*plan.mine[i])]]
                assert local.counts == tuple(plan.mine[i][1] - plan.mine[i][0] for plan in plans)
                nodes.append(local.evaluate(given_leaves))
        plan = _plan(tree, hosts, 0)
        assert sum(plan.counts) == len(nodes)
        assert ReductionTree(plan.counts, plan.code).evaluate(nodes).text == definition(0, total)
