"""The bubble as algebra against schedules that were played through, with fractions: equal means equal."""

from __future__ import annotations

import csv
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest

from lockstep.config.errors import ConfigError
from lockstep.planner.teach import pipeline
from lockstep.planner.teach.pipeline import Options

UNEVEN = [(1, 2, 1, 1), (3, 1), (Fraction(1, 2), Fraction(1, 3), 1, Fraction(5, 7)), (2, 2, 2), (5, 1, 1, 1, 4), (1,)]
UP_TO = range(1, 65)


def slot_grid(stages: int, micro_batches: int) -> list[list[int | None]]:
    """The dumb oracle: time slot by time slot, each stage takes what its predecessor finished in the slot before."""
    slots: list[list[int | None]] = []
    while not slots or slots[-1][-1] != micro_batches - 1:
        at = len(slots)
        first = at if at < micro_batches else None
        slots.append([first, *(slots[-1][:-1] if slots else [None] * (stages - 1))])
    return slots


@pytest.mark.parametrize("p", UP_TO)
def test_the_bubble_is_exact(p):
    for m in UP_TO:
        tasks = pipeline.play([1] * p, m)
        assert pipeline.counted_idle(tasks, p) == pipeline.bubble(p, m) == pipeline.drain_idle([1] * p, m)


@pytest.mark.parametrize("p", range(1, 65, 7))
def test_the_schedule_is_the_slot_grid(p):
    for m in range(1, 65, 9):
        slots = slot_grid(p, m)
        grid = {(task.stage, task.start): task.micro_batch for task in pipeline.play([1] * p, m)}
        assert grid == {(stage, at): one for at, row in enumerate(slots) for stage, one in enumerate(row) if one is not None}
        idle = sum(one is None for row in slots for one in row)
        assert Fraction(idle, p * len(slots)) == pipeline.bubble(p, m)


@pytest.mark.parametrize("p", UP_TO)
def test_steady_decoding_is_exact(p):
    for m in sorted({1, 2, max(1, p - 1), p, p + 1, 2 * p, *range(3, 65, 12)}):
        tasks = pipeline.play([1] * p, m, 2)
        busy = pipeline.counted_busy(tasks, p, *pipeline.steady_window(tasks, p, 2))
        assert set(busy) == {min(Fraction(1), Fraction(m, p))} == set(pipeline.steady_busy([1] * p, m))


@pytest.mark.parametrize("times", UNEVEN)
@pytest.mark.parametrize("hop", [0, Fraction(1, 4)])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 16])
def test_uneven_stages_are_exact(times, hop, m):
    p = len(times)
    once = pipeline.play(times, m, 1, hop)
    assert max(task.end for task in once) == pipeline.makespan(times, m, hop)
    assert pipeline.counted_idle(once, p) == pipeline.drain_idle(times, m, hop)
    rounds = 12
    steady = pipeline.play(times, m, rounds, hop)
    assert pipeline.counted_busy(steady, p, *pipeline.steady_window(steady, p, rounds)) == pipeline.steady_busy(times, m, hop)


def test_no_stage_does_two_things_at_once_and_no_micro_batch_is_in_two_places():
    tasks = pipeline.play((1, 3, 2), 4, 5, Fraction(1, 2))
    for key in (lambda t: t.stage, lambda t: t.micro_batch):
        for group in {key(t) for t in tasks}:
            mine = sorted((t for t in tasks if key(t) == group), key=lambda t: t.start)
            assert all(a.end <= b.start for a, b in pairwise(mine))


def test_the_published_table():
    rows = list(csv.DictReader((Path(__file__).parent / "data" / "pipeline_bubble.csv").open()))
    assert len(rows) == 48
    for row in rows:
        p, m = int(row["p"]), int(row["m"])
        assert pipeline.bubble(p, m) == Fraction(row["bubble_fraction_exact"])
        assert pipeline.makespan([1] * p, m) == int(row["total_slots"])
        assert float(pipeline.steady_busy([1] * p, m)[0]) == pytest.approx(float(row["decode_steady_util"]), abs=1e-4)


@pytest.mark.parametrize("p", [1, 2, 4, 7, 16])
def test_enough_micro_batches_and_not_one_more(p):
    for wanted in (Fraction(1, 2), Fraction(9, 10), Fraction(99, 100)):
        m = pipeline.micro_batches_for(p, wanted)
        assert 1 - pipeline.bubble(p, m) >= wanted
        assert m == 1 or 1 - pipeline.bubble(p, m - 1) < wanted


def test_the_grid_shows_the_schedule():
    assert pipeline.grid(pipeline.play((1, 2), 2), 2) == "stage 0  01...\nstage 1  .0011"
    assert "more than" in pipeline.grid(pipeline.play([1], 200), 1)


def test_report_and_picture_say_the_same():
    result = pipeline.simulate(Options(stages=3, micro_batches=5, stage_times="1,1/2,2", schedule="decode"))
    assert result.idle_simulated == result.idle_formula
    assert str(result.idle_formula) in pipeline.report(result) and str(result.idle_formula) in pipeline.picture(result)
    assert "the same" in pipeline.report(result)


@pytest.mark.parametrize(
    "wrong",
    [
        {"stages": 0},
        {"micro_batches": 0},
        {"stage_times": "1,2"},
        {"stage_times": "1,1,1,0"},
        {"stage_times": "a,1,1,1"},
        {"hop": "-1"},
        {"hop": "1e400"},
    ],
)
def test_impossible_pipelines_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        pipeline.simulate(Options(**wrong))
