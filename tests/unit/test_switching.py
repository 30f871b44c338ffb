"""The interval at which the interpreter changes hands: short while a process serves, and as before afterwards."""

import sys

import pytest

from lockstep.utils.switching import SWITCH_S, short_switches


def test_interval_is_that_of_before_again():
    before = sys.getswitchinterval()
    with pytest.raises(RuntimeError, match="out"), short_switches():
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        raise RuntimeError("out")
    assert sys.getswitchinterval() == before
