"""Ranks without a driver find out who of them is gone, over a store that is in this process; the ranks are threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch.distributed as dist

from lockstep.distributed import parallel_state
from lockstep.executor import causes, roll_call, wire
from lockstep.executor.causes import Causes
from lockstep.executor.contract import ExecutorError

TIMED_OUT = "Timed out waiting 5000ms for recv operation to complete"


@dataclass
class Group:
    rank_in_group: int
    world_size: int = 3
    failed: str = ""

    @property
    def ranks(self) -> list[int]:
        return list(range(self.world_size))

    @property
    def cpu_communicator(self) -> Group:
        return self

    def fail(self, reason: str) -> None:
        self.failed = reason


@dataclass
class Groups:
    replica: Group


class CutOff:
    """A store on the other side of a cable that was pulled: no call returns before the test ends."""

    def __init__(self, end: threading.Event) -> None:
        self._end = end

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any) -> Any:
            self._end.wait(20)
            raise RuntimeError("the test is over")

        return call


def causes_of(rank: int, monkeypatch: pytest.MonkeyPatch, store: Any) -> Causes:
    monkeypatch.setattr(parallel_state, "shared_store", lambda _: store)
    found = Causes(Groups(Group(rank)), 1)  # type: ignore[arg-type]
    found.hosts = ["here", "there", "there"]
    return found


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Causes]]:
    """Three of them; those that a test closes are gone."""
    monkeypatch.setattr(roll_call, "LOOK_S", 0.01)
    monkeypatch.setattr(causes, "PATIENCE_S", 0.4)
    store = dist.HashStore()
    made = [causes_of(rank, monkeypatch, store) for rank in range(3)]
    yield made
    for one in made:
        one.close()


def raised(message: str, number: int = 7, error_type: str = "RuntimeError") -> wire.Raised:
    return wire.Raised(number, "step 9", error_type, message, "Traceback ...", fatal=True)


def test_the_rank_that_does_not_answer_is_named_by_all(ranks: list[Causes]) -> None:
    ranks[2].close()
    with ThreadPoolExecutor(2) as pool:
        errors = list(pool.map(lambda rank: ranks[rank].explain(raised(TIMED_OUT)), (0, 1)))
    for error in errors:
        assert (error.rank, error.kind, error.phase) == (2, "lost", "step 9")
        assert str(error).startswith("rank 2 (there) is lost: it did not answer when rank ") and TIMED_OUT in str(error)


def test_a_rank_whose_engine_is_busy_answers_all_the_same(ranks: list[Causes]) -> None:
    error = ranks[0].explain(raised(TIMED_OUT))  # nobody else has noticed anything
    assert (error.rank, error.kind) == (0, "raised") and "lost" not in str(error)
    assert ranks[0]._groups.replica.failed.startswith("rank 0 raised RuntimeError in step 9")  # type: ignore[attr-defined]


def test_several_are_gone_and_who_is_late_is_told_the_same(ranks: list[Causes]) -> None:
    ranks[0].close()
    ranks[2].close()
    error = ranks[1].explain(raised(TIMED_OUT))
    assert error.rank is None and str(error).startswith("ranks 0, 2 (here, there) are lost: they did not answer when rank 1 asked")
    assert str(ranks[0].explain(raised("Connection closed by peer"))) == str(error)


def test_a_cause_that_was_noted_is_better_than_a_roll(ranks: list[Causes]) -> None:
    own = ranks[2].explain(raised("'oops'", error_type="KeyError"))
    ranks[2].close()
    error = ranks[0].explain(raised(TIMED_OUT))
    assert str(error) == str(own) == "rank 2 raised KeyError in step 9: 'oops'" and error.rank == 2


def test_a_rank_that_reaches_nobody_says_so_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causes, "PATIENCE_S", 0.1)
    end = threading.Event()
    alone = causes_of(1, monkeypatch, CutOff(end))
    try:
        began = time.monotonic()
        error = alone.explain(raised(TIMED_OUT))
        assert isinstance(error, ExecutorError) and time.monotonic() - began < 5
        assert str(error).startswith("rank 1 is cut off: it cannot reach the store of all ranks any more") and TIMED_OUT in str(error)
    finally:
        end.set()
        alone.close()
