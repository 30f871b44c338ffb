"""--check-collectives: a divergence is a typed error that names both ranks, operations and call sites, within a second."""

from __future__ import annotations

import os

import pytest

from lockstep.testing.ranks import RankError, run_ranks, run_ranks_outcomes

JOBS = "tests.distributed.ledger_jobs"
BOARDS = pytest.mark.parametrize("store", [False, True], ids=["shm", "store"])
SOON_S = 1.0


@BOARDS
@pytest.mark.parametrize("world_size", [2, 3])
def test_agreeing_ranks_are_left_alone(store, world_size):
    for right, _, seen, first in run_ranks(f"{JOBS}:agree", world_size, store, 20):
        assert right
        assert seen == 80
        assert first == "tp:0.all_reduce"


@BOARDS
@pytest.mark.parametrize(
    ("job", "zero", "one"),
    [
        ("different_op", "rank 0 entered all_reduce(float32 [2, 3])", "rank 1 entered all_gather(float32 [2, 3], dim=0)"),
        ("different_shape", "rank 0 entered all_reduce(float32 [2, 3])", "rank 1 entered all_reduce(float32 [3, 3])"),
        ("different_dtype", "rank 0 entered all_reduce(bfloat16 [2])", "rank 1 entered all_reduce(float32 [2])"),
    ],
)
def test_divergence_names_both_ranks_operations_and_call_sites(job, zero, one, store):
    for kind, text, took in run_ranks(f"{JOBS}:{job}", 2, store):
        assert kind == "CollectiveMismatchError"
        assert zero in text and one in text
        assert (text.count("ledger_jobs.py:") == 2 and f"({job}" in text) or "(<lambda>)" in text
        assert "collective 1 of group tp:0 [0, 1]" in text
        assert took < SOON_S


@BOARDS
def test_waiting_for_each_other_in_different_groups_is_seen_at_once(store):
    for kind, text, took in run_ranks(f"{JOBS}:different_group", 2, store):
        assert kind == "CollectiveMismatchError"
        assert "tp:0" in text and "world:0" in text and text.count("ledger_jobs.py:") == 2
        assert took < SOON_S


@BOARDS
def test_every_rank_hears_of_it_also_those_that_receive_or_meet_elsewhere(store):
    outcomes = run_ranks(f"{JOBS}:bystanders", 4, store)
    assert [kind for kind, _, _ in outcomes] == ["CollectiveMismatchError"] * 4
    for _, text, took in outcomes:
        assert "all_gather" in text and "all_reduce" in text
        assert took < 0.5 + SOON_S


@BOARDS
def test_a_late_rank_is_named_with_its_last_act(store):
    timeout_s = 0.5
    outcomes = run_ranks(f"{JOBS}:skip", 3, store, timeout_s)
    assert [kind for kind, _, _ in outcomes] == ["CollectiveTimeoutError"] * 3
    _, text, took = outcomes[0]
    assert "rank 1 is missing" in text
    assert "the last thing it entered was all_gather(float32 [3], dim=0)" in text
    assert "entered all_reduce(float32 [5])" in text
    assert 0.9 * timeout_s <= took < timeout_s + SOON_S


@BOARDS
def test_a_rank_that_left_is_not_waited_for(store):
    outcomes = run_ranks(f"{JOBS}:leave_early", 2, store)
    assert outcomes[1][0] == "none"
    kind, text, took = outcomes[0]
    assert kind == "CollectiveTimeoutError"
    assert "rank 1 is missing: it left the ledger" in text
    assert took < SOON_S


def test_a_dead_rank_is_not_waited_for():
    survivor, dead = run_ranks_outcomes(f"{JOBS}:die", 2, init=True)
    assert isinstance(dead, RankError) and "SIGKILL" in dead.message
    # The survivor reported before it met the broken group on its way out, or failed there.
    if not isinstance(survivor, RankError):
        kind, text, took = survivor
        assert kind == "CollectiveTimeoutError" and "rank 1 is missing: its process" in text and took < SOON_S


def test_nothing_is_left_in_shared_memory():
    run_ranks(f"{JOBS}:agree", 2, False, 1)
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("lockstep_ledger")]
