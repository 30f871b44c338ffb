"""Cycles are looked for rarely while a process serves, and as before afterwards."""

import gc

import pytest

from lockstep.utils.collection import THRESHOLDS, rare_collections


def test_thresholds_are_those_of_before_again():
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    with pytest.raises(RuntimeError, match="out"), rare_collections():
        assert gc.get_threshold() == THRESHOLDS and gc.get_freeze_count() > frozen and gc.isenabled()
        raise RuntimeError("out")
    assert gc.get_threshold() == before and gc.get_freeze_count() == 0


def test_cycles_are_found_all_the_same():
    class Node:
        me = None

    def make(count):
        for _ in range(count):
            node = Node()
            node.me = node

    with rare_collections():
        make(3 * THRESHOLDS[0])
        alive = sum(isinstance(o, Node) for o in gc.get_objects())
    assert alive < 2 * THRESHOLDS[0]
