"""Idle shares and pictures out of made-up timelines, whose answers can be counted by hand."""

from __future__ import annotations

import pytest

from lockstep.observability.pipeline_chart import Schedule, bounded_idle, steady_idle
from lockstep.observability.timeline import NO_STEP, Row
from lockstep.observability.trace import Profile, Track


def step(number: int, began: float, ended: float) -> Row:
    return (f"step {number}", "step", began, ended, number, {})


def wait(began: float, ended: float) -> Row:
    return ("wait for the stage before", "idle", began, ended, NO_STEP, {})


def profile(*ranks: list[Row]) -> Profile:
    return Profile([Track("engine", []), *(Track(f"rank {i}", rows) for i, rows in enumerate(ranks))])


FILL = profile(
    [step(i, i, i + 1) for i in range(3)],
    # The second stage enters a step at once and waits inside it for its input.
    [step(0, 0, 2), step(1, 2, 3), step(2, 3, 4), wait(0, 1)],
)


def test_fill_and_drain_is_the_formula_with_equal_stages():
    schedule = Schedule.of(FILL, stages=2, stage_size=1)
    assert schedule.micro_batches == 3
    assert schedule.window == (0, 4)
    assert schedule.idle_shares() == [0.25, 0.25]
    assert schedule.mean_s() == [1.0, 1.0]
    assert bounded_idle([1.0, 1.0], 3) == pytest.approx(1 / 4)  # (p-1)/(p+m-1)


def test_the_first_rank_of_each_stage_stands_for_it():
    rows = [step(0, 0, 1)]
    schedule = Schedule.of(profile(rows, [], [step(0, 1, 2)], []), stages=2, stage_size=2)
    assert schedule.idle_share() == 0.5


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("in_flight", [1, 2, 3, 8])
def test_steady_decode_is_the_formula_with_equal_stages(stages: int, in_flight: int):
    assert steady_idle([2.0] * stages, in_flight) == pytest.approx(1 - min(1, in_flight / stages))


def test_the_slowest_stage_sets_the_beat():
    assert bounded_idle([1.0, 3.0], 10) == pytest.approx(1 - 10 * 4 / (2 * (4 + 9 * 3)))
    assert steady_idle([1.0, 3.0], 2) == pytest.approx(1 - 2 / 3)
    assert bounded_idle([], 0) == steady_idle([], 1) == 0.0


def test_played_again_fills_and_drains_in_no_time_between():
    late = Schedule([[(0.0, 1.0, 0), (1.5, 2.5, 1), (3.0, 4.0, 2)], [(1.2, 2.0, 0), (2.0, 2.2, 0), (2.7, 3.7, 1), (4.5, 5.5, 2)]])
    assert late.played().busy == [[(0, 1, 0), (1, 2, 1), (2, 3, 2)], [(1, 2, 0), (2, 3, 1), (3, 4, 2)]]
    assert late.idle_share() == pytest.approx(1 - 3 / 5.5)
    assert late.played().idle_share() == pytest.approx(bounded_idle(late.mean_s(), 3))


@pytest.mark.parametrize(("in_flight", "idle"), [(1, 0.5), (2, 0.0), (3, 0.0)])
def test_played_again_with_so_many_in_flight_is_the_formula(in_flight: int, idle: float):
    even = Schedule([[(i, i + 1, i) for i in range(400)]] * 2)
    assert even.played(in_flight).middle().idle_share() == pytest.approx(steady_idle([1, 1], in_flight), abs=0.01) == idle


def test_played_again_a_stage_waits_for_the_slower_one_each_time():
    """Stages that take alike in the mean: two in flight, and 1 and 3 in turn, so that every turn takes 3."""
    first = [(4.0 * i, 4.0 * i + (1, 3)[i % 2], i) for i in range(400)]
    second = [(4.0 * i + 3, 4.0 * i + 3 + (1, 3)[i % 2], i) for i in range(400)]
    schedule = Schedule([first, second])
    assert steady_idle(schedule.mean_s(), 2) == 0.0
    assert schedule.played(2).middle().idle_share() == pytest.approx(1 / 3, abs=0.01)


def test_the_picture_shows_who_works_on_what():
    lines = Schedule.of(FILL, stages=2, stage_size=1).picture().splitlines()[1:]
    cells = [line.split("|")[1] for line in lines]
    assert [len(c) for c in cells] == [96, 96]
    assert cells[0] == "0" * 24 + "1" * 24 + "2" * 24 + "." * 24
    assert cells[1] == "." * 24 + "0" * 24 + "1" * 24 + "2" * 24


def test_the_middle_has_neither_filling_nor_draining():
    many = profile([step(i, i, i + 1) for i in range(20)], [step(i, i + 1, i + 2) for i in range(20)])
    schedule = Schedule.of(many, stages=2, stage_size=1)
    assert schedule.idle_share() > 0.04
    assert schedule.middle().idle_share() == 0.0
    assert schedule.middle().window == (6, 15)


def test_a_long_run_shows_its_middle():
    many = profile([step(i, i, i + 1) for i in range(100)], [step(i, i + 1, i + 2) for i in range(100)])
    schedule = Schedule.of(many, stages=2, stage_size=1)
    assert set(schedule.picture().splitlines()[1].split("|")[1]) >= set("67890123")
    text = schedule.summary(in_flight=2)
    assert "idle, measured: 1.0%" in text and "1.0% = (p-1)/(p+m-1)" in text and "0.0% with equal ones" in text
