"""Golden layouts: what the field's scripts and people expect."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lockstep.distributed.topology import Topology


def spans(text: str) -> list[list[int]]:
    return [[int(rank) for rank in group.split(",")] for group in text.strip("()").split(")(")]


GOLDEN = [
    (
        Topology(8, tp=2, pp=2, dp=2),
        {
            "tp": "(0,1)(2,3)(4,5)(6,7)",
            "pp": "(0,2)(1,3)(4,6)(5,7)",
            "dp": "(0,4)(1,5)(2,6)(3,7)",
            "ep": "(0,1,4,5)(2,3,6,7)",
            "eplb": "(0,1,4,5)(2,3,6,7)",
            "inner_dp_world": "(0,1,2,3)(4,5,6,7)",
        },
    ),
    (Topology(4, tp=2, pcp=2, dcp=2), {"tp": "(0,1)(2,3)", "pcp": "(0,2)(1,3)", "dcp": "(0,1)(2,3)", "ep": "(0,1,2,3)"}),
    (
        Topology(8, tp=4, pp=2, dcp=2),
        {"tp": "(0,1,2,3)(4,5,6,7)", "pp": "(0,4)(1,5)(2,6)(3,7)", "dcp": "(0,1)(2,3)(4,5)(6,7)", "ep": "(0,1,2,3)(4,5,6,7)"},
    ),
]


@pytest.mark.parametrize(("topology", "expected"), GOLDEN)
def test_golden_layouts(topology, expected):
    assert {name: topology.groups(name) for name in expected} == {name: spans(text) for name, text in expected.items()}


def test_external_data_parallel_is_what_is_left():
    t = Topology(12, tp=3, dp=2)
    assert t.external_dp == 2 and t.shape == (2, 2, 1, 1, 3)
    assert t.groups("dp") == [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]


def test_errors_name_value_rule_and_remedy():
    with pytest.raises(ValueError, match=r"world size 6 is not a multiple of tensor 4 .* = 4: start 8 ranks"):
        Topology(6, tp=4)
    with pytest.raises(ValueError, match=r"decode context parallel size 3 does not divide tensor parallel size 4.*\[1, 2, 4\]"):
        Topology(4, tp=4, dcp=3)
    with pytest.raises(ValueError, match=r"rank 4 is outside 0\.\.3"):
        Topology(4, tp=4).coordinates(4)
    with pytest.raises(ValueError, match="unknown group 'xp'"):
        Topology(4).groups("xp")
    with pytest.raises(ValueError, match=r"tp index 2 is outside 0\.\.1"):
        Topology(4, tp=2).rank_at(tp=2)


def test_importing_it_loads_no_torch():
    modules = ", ".join(f"lockstep.distributed.{name}" for name in ("topology", "observer", "rendezvous"))
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
