"""Who goes on in another engine, when, and who is given up: an engine that is killed by some of its jobs, acted out."""

from __future__ import annotations

import pytest

from lockstep.frontend.engine_keeper import POLICY
from lockstep.frontend.replays import MOST_DEATHS, SETTLED_S, TRIAL_S, Replays


def act(names: list[str], poison: set[str], step_s: float = 0.1) -> tuple[set[str], int]:
    """Run jobs, of which those of `poison` kill the engine as soon as it has them: (given up, engines that died)."""
    book, given_up, deaths, now_s = Replays(), set[str](), 0, 0.0
    for name in names:
        book.sent(name)
    there = set(names)
    for _ in range(10_000):
        if there & poison:
            deaths += 1
            for name in book.died(now_s):
                given_up.add(name)
                book.ended(name)
            there = set()
        for name in there:
            book.brought(name, now_s)
        now_s += step_s
        fresh = book.due(now_s)
        for name in fresh:
            book.sent(name)
        there |= set(fresh)
        if there | given_up == set(names) and not there & poison:
            return given_up, deaths
    raise AssertionError("it does not end")


@pytest.mark.parametrize("at", [0, 7, 15])
def test_one_cause_is_found_among_many(at: int) -> None:
    names = [str(i) for i in range(16)]
    given_up, deaths = act(names, {str(at)})
    assert given_up == {str(at)} and deaths == (MOST_DEATHS if at else MOST_DEATHS - 1)


def test_the_server_outlives_several_causes() -> None:
    names = [str(i) for i in range(16)]
    given_up, deaths = act(names, {"3", "4", "11"})
    assert given_up == {"3", "4", "11"}
    assert deaths < POLICY.most_failures, "the engine is given up before the requests are"


def test_who_only_waits_is_not_blamed() -> None:
    book = Replays()
    book.kept("a")
    for _ in range(10):
        assert book.died(0.0) == []
    assert book.due(0.0) == ["a"]


def test_who_runs_well_is_blamed_as_for_the_first_time() -> None:
    book, now_s = Replays(), 0.0
    for _ in range(10):
        book.sent("a")
        book.brought("a", now_s)
        now_s += SETTLED_S
        assert book.died(now_s) == [] and book.due(now_s) == ["a"]


def test_a_suspect_waits_for_the_one_before() -> None:
    book = Replays()
    for _ in range(2):
        book.sent("a"), book.sent("b")
        book.died(0.0)
    assert book.due(0.0) == ["a"]
    book.sent("a")
    assert book.due(100.0) == []
    book.brought("a", 100.0)
    assert book.due(100.0) == [] and book.due(100.0 + TRIAL_S) == ["b"]
    book.sent("new")
    book.cut_off()
    assert book.due(200.0) == ["new", "a"], "who is new does not wait"
