"""What a rank's wait counts as: for a rank of its own stage, or for another stage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from lockstep.worker import meter
from lockstep.worker.meter import Meter


class Times:
    """Told in nanoseconds."""

    def __init__(self) -> None:
        self.for_ranks = self.for_stages = 0

    def waited(self, ns: int) -> None:
        self.for_ranks += ns

    def waited_for_stage(self, ns: int) -> None:
        self.for_stages += ns


@pytest.mark.parametrize(("whole", "for_ranks", "for_stages"), [(False, 3, 7), (True, 0, 10)])
def test_a_wait_for_a_stage_of_which_another_rank_hears_counts_whole(
    whole: bool, for_ranks: int, for_stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds, three of them in a meeting with a rank of the same stage."""
    now = SimpleNamespace(ns=0, meeting_s=0.0)
    monkeypatch.setattr(meter, "now_ns", lambda: now.ns)
    times = Times()
    groups: Any = SimpleNamespace(**dict.fromkeys(("tp", "dp", "pcp", "dcp", "ep", "pp"), Mock(world_size=1, communicator=None)))
    found = Meter(groups, SimpleNamespace(times=times))  # type: ignore[arg-type]
    found._clocks.append(lambda: now.meeting_s)
    with found.stage(whole=whole):
        now.ns, now.meeting_s = 10_000_000_000, 3.0
    found.stepped()
    assert (times.for_ranks, times.for_stages) == (for_ranks * 1_000_000_000, for_stages * 1_000_000_000)
