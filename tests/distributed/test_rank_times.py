"""A rank that is slow is named within 20 steps: real processes, and what they wrote in their progress cells."""

from __future__ import annotations

from lockstep.cluster.live import LiveBook
from lockstep.engine.stats import EngineReport
from lockstep.executor.contract import Executor
from lockstep.testing.executors import decode_plan, fake_config, fake_executor
from lockstep.testing.observed import report

STEPS = 16  # of which it is told twice


def steps(executor: Executor, first: int, count: int) -> EngineReport:
    """Run some; what the engine would report then."""
    for step in range(first, first + count):
        executor.execute_model(decode_plan(step)).result(30.0)
    executor.collective_rpc("echo")  # the rank that reports nothing has ended its steps too
    return report(first + count, 0.02, executor.live())


def test_a_slow_rank_is_marked_in_less_than_20_steps() -> None:
    with fake_executor(2, backend="mp") as executor:
        live = LiveBook(fake_config(2).parallel, 1)
        live.heard(0, steps(executor, 0, 3), now_s=1.0)
        executor.collective_rpc("arm", (1, "sleep:0.02"))
        live.heard(0, steps(executor, 3, STEPS // 2), now_s=2.0)
        assert not any(rank.slow for rank in live.now(0, "ready", 0, now_s=2.0).ranks), "once may be chance"
        live.heard(0, steps(executor, 3 + STEPS // 2, STEPS // 2), now_s=3.0)
        ranks = live.now(0, "ready", 0, now_s=3.0).ranks
        assert [rank.slow for rank in ranks] == [False, True]
        assert ranks[1].step_ms >= 20.0 and ranks[0].step_ms < 20.0


def test_cells_tell_who_where_and_how_much() -> None:
    with fake_executor(2, backend="mp") as executor:
        found = steps(executor, 0, 5).ranks
        pids = [who["pid"] for who in executor.collective_rpc("who")]
        assert [rank.rank for rank in found] == [0, 1] and [rank.pid for rank in found] == pids
        assert [rank.steps for rank in found] == [5, 5] and all(rank.step_s > 0 and rank.memory_bytes > 1 << 20 for rank in found)
        assert all(rank.beat_age_s is not None and rank.beat_age_s < 30 for rank in found)
    assert executor.live() == [], "the ranks have ended"


def test_one_rank_in_this_process_is_told_too() -> None:
    with fake_executor(1, backend="uni") as executor:
        (found,) = steps(executor, 0, 4).ranks
        assert found.steps == 4 and found.memory_bytes > 1 << 20 and found.wait_s == 0.0
