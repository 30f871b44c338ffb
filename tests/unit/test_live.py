"""Replicas and ranks as they are now, made of their reports."""

from __future__ import annotations

import pytest

from lockstep.cluster.live import LiveBook
from lockstep.config.tree import ParallelConfig
from lockstep.observability.histogram import Histogram, percentile
from lockstep.observability.predictor import REFIT, StepPredictor, solve
from lockstep.testing.observed import rank, report


def book(tp: int = 2, pp: int = 1) -> LiveBook:
    return LiveBook(ParallelConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp), 1)


def test_the_slow_rank_is_the_one_that_waits_least() -> None:
    live = book(tp=4)
    for steps in (5, 15, 25):
        # all steps take 30 ms of wall clock; rank 2 works for 29 of them, the others wait for it
        live.heard(0, report(steps, 0.03, [rank(i, steps, 0.03, 0.001 if i == 2 else 0.021) for i in range(4)]), now_s=float(steps))
    ranks = live.now(0, "ready", 0, now_s=25.0).ranks
    assert [r.slow for r in ranks] == [False, False, True, False]
    assert [r.step_ms for r in ranks] == [30.0] * 4
    assert min(ranks, key=lambda r: r.wait_ms).rank == 2


def test_equal_ranks_and_small_differences_are_not_slow() -> None:
    live = book()
    for steps in (5, 15, 25):
        live.heard(0, report(steps, 0.001, [rank(0, steps, 0.001), rank(1, steps, 0.0018)]), now_s=float(steps))
    assert not any(r.slow for r in live.now(0, "ready", 0, now_s=25.0).ranks), "0.8 ms more is noise"


def test_stages_of_one_rank_are_compared_with_each_other_and_ranks_of_a_stage_among_themselves() -> None:
    alone, pairs = book(tp=1, pp=3), book(tp=2, pp=2)
    for steps in (5, 15, 25):
        alone.heard(0, report(steps, 0.03, [rank(i, steps, 0.01 * (3 if i == 1 else 1)) for i in range(3)]), now_s=float(steps))
        pairs.heard(0, report(steps, 0.03, [rank(i, steps, 0.01 if i < 2 else 0.03) for i in range(4)]), now_s=float(steps))
    assert [r.slow for r in alone.now(0, "ready", 0, now_s=25.0).ranks] == [False, True, False]
    found = pairs.now(0, "ready", 0, now_s=25.0).ranks
    assert [(r.pp, r.tp) for r in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert not any(r.slow for r in found), "a longer stage is not a slow rank"


def test_bubble_is_what_a_rank_idles_of_the_engines_busy_time() -> None:
    live = book(tp=1, pp=2)
    for steps in (10, 20):
        ranks = [rank(0, steps, 0.01), rank(1, steps, 0.012, stage_wait_s=steps * 0.007)]
        live.heard(0, report(steps, 0.02, ranks), now_s=float(steps))
    found = live.now(0, "ready", 0, now_s=20.0).ranks
    assert [r.bubble for r in found] == [pytest.approx(0.5), pytest.approx(0.75)]
    assert found[1].stage_wait_ms == pytest.approx(7.0)


def test_rates_are_of_the_last_two_reports_and_step_times_stay_while_it_idles() -> None:
    live = book()
    live.heard(0, report(10, 0.02, [rank(0, 10, 0.02), rank(1, 10, 0.02)], generated_tokens=40, scheduled_tokens=100), now_s=1.0)
    live.heard(0, report(30, 0.02, [rank(0, 30, 0.02), rank(1, 30, 0.02)], generated_tokens=90, scheduled_tokens=200), now_s=1.5)
    found = live.now(0, "ready", 0, now_s=1.6)
    assert found.tokens_per_s == 100.0 and found.prompt_tokens_per_s == 100.0
    assert found.step_ms == found.predicted_step_ms == 20.0 and found.report_age_s == pytest.approx(0.1)
    live.heard(0, report(30, 0.02, [rank(0, 30, 0.02), rank(1, 30, 0.02)], generated_tokens=90, scheduled_tokens=200), now_s=2.0)
    idle = live.now(0, "ready", 0, now_s=2.0)
    assert idle.tokens_per_s == 0.0 and idle.step_ms == 20.0 and idle.ranks[0].step_ms == 20.0


def test_counters_go_on_when_a_replica_begins_anew_and_gauges_do_not() -> None:
    live = book()
    live.heard(0, report(10, 0.02, [], finished=4, running=3), now_s=1.0)
    live.lost(0)
    lost = live.now(0, "waiting", 0, now_s=1.2)
    assert lost.stats is not None and lost.stats.finished == 4 and lost.report_age_s is None and lost.ranks == []
    live.heard(0, report(5, 0.02, [], finished=1, running=1), now_s=2.0)
    back = live.now(0, "ready", 1, now_s=2.0)
    assert back.stats is not None and back.steps is not None
    assert back.stats.finished == 5 and back.stats.running == 1 and back.steps.seconds.count == 15


def test_heartbeats_age_between_reports_too() -> None:
    live = book(tp=1)
    live.heard(0, report(1, 0.02, [rank(0, 1, 0.02, beat_age_s=0.1)]), now_s=1.0)
    assert live.now(0, "ready", 0, now_s=8.0).ranks[0].heartbeat_age_s == pytest.approx(7.1)


def test_a_line_through_steps_is_found() -> None:
    predictor = StepPredictor()
    assert predictor.predict(1, 1, 1) is None
    for i in range(4 * REFIT):
        tokens, rows, context = 1 + i % 7, 1 + i % 3, 10 * (i % 5)
        predictor.learn(tokens, rows, context, 0.001 + 0.0002 * tokens + 0.0005 * rows + 0.00001 * context)
    assert predictor.predict(100, 2, 500) == pytest.approx(0.001 + 0.02 + 0.001 + 0.005, rel=0.01)


def test_steps_that_are_all_alike_can_be_learned() -> None:
    predictor = StepPredictor()
    for _ in range(REFIT):
        predictor.learn(4, 4, 100, 0.01)
    assert predictor.predict(4, 4, 100) == pytest.approx(0.01, rel=0.01)
    assert solve([[0.0, 2.0], [1.0, 1.0]], [2.0, 3.0]) == pytest.approx([2.0, 1.0])


def test_histograms_count_by_upper_bound() -> None:
    found = Histogram.of((1, 2))
    for x in (0.5, 1, 1.5, 2, 3):
        found.observe(x)
    assert found.cumulative() == [("1.0", 2), ("2.0", 4), ("+Inf", 5)] and found.total == 8.0 and found.count == 5
    other = found.copy()
    found.add(other)
    assert found.count == 10 and other.count == 5
    values = [1.0, 2.0, 3.0, 4.0]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.51, 0.99, 1.0)] == [1.0, 2.0, 3.0, 4.0, 4.0]
    assert percentile([], 0.5) is None


def test_nobody_is_slow_on_an_idle_server() -> None:
    live = book()
    for steps in (5, 15, 25):
        live.heard(0, report(steps, 0.03, [rank(0, steps, 0.01), rank(1, steps, 0.03)]), now_s=float(steps))
    assert [r.slow for r in live.now(0, "ready", 0, now_s=26.0).ranks] == [False, True]
    for now_s in (27.0, 40.0):
        live.heard(0, report(25, 0.03, [rank(0, 25, 0.01), rank(1, 25, 0.03)]), now_s=now_s)
    found = live.now(0, "ready", 0, now_s=40.5)
    assert not any(r.slow for r in found.ranks) and found.ranks[1].step_ms == 30.0


def heard(live: LiveBook, steps: int, slow: bool) -> list[bool]:
    """Who is slow after a report of as many steps: rank 1, in all steps up to now, or nobody."""
    live.heard(0, report(steps, 0.03, [rank(0, steps, 0.01), rank(1, steps, 0.03 if slow else 0.01)]), now_s=float(steps))
    return [one.slow for one in live.now(0, "ready", 0, now_s=float(steps)).ranks]


def test_one_report_makes_nobody_slow() -> None:
    live = book()
    assert heard(live, 1, False) == [False, False]
    assert heard(live, 20, True) == [False, False], "the first steps after a load are no rule"
    live.heard(0, report(40, 0.03, [rank(0, 40, 0.0199), rank(1, 40, 0.02)]), now_s=40.0)
    assert not any(one.slow for one in live.now(0, "ready", 0, now_s=40.0).ranks), "it was once"


def test_a_few_steps_make_nobody_slow_and_are_not_forgotten() -> None:
    live = book()
    assert [heard(live, steps, True)[1] for steps in (1, 4, 7, 10, 13, 16, 19, 22, 25, 28)] == [False] * 6 + [True] * 4


def test_a_rank_that_was_slow_in_a_former_life_is_asked_anew() -> None:
    live = book()
    assert [heard(live, steps, True)[1] for steps in (5, 15, 25)] == [False, False, True]
    live.lost(0)
    assert [heard(live, steps, True)[1] for steps in (5, 15, 25)] == [False, False, True]
