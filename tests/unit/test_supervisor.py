"""The life of a replica, by hand: no process, no clock."""

from __future__ import annotations

import pytest

from lockstep.cluster.supervisor import RestartPolicy, State, Supervisor

POLICY = RestartPolicy(first_s=1.0, factor=2.0, most_s=5.0, most_failures=4)


def test_a_replica_that_dies_is_started_again_after_a_pause() -> None:
    s = Supervisor(2, POLICY)
    s.ready(0, 1.0)
    s.ready(1, 1.0)
    assert s.next_due_s() is None
    assert s.failed(0, 10.0) is State.WAITING
    assert s.next_due_s() == 11.0
    assert s.due(10.9) == [] and s.due(11.0) == [0] and s.due(99.0) == []
    assert s.lives[0].state is State.STARTING and s.lives[1].state is State.READY
    s.ready(0, 12.0)
    assert (s.restarts, s.hopeless) == (1, False)


def test_pauses_double_up_to_the_longest_and_end_in_giving_up() -> None:
    s, now, pauses = Supervisor(1, POLICY), 0.0, []
    while s.failed(0, now) is State.WAITING:
        pauses.append(s.lives[0].due_s - now)
        now = s.lives[0].due_s
        assert s.due(now) == [0]
    assert pauses == [1.0, 2.0, 4.0]
    assert s.lives[0].state is State.GIVEN_UP and s.hopeless
    assert s.due(1e9) == [] and s.next_due_s() is None
    assert POLICY.pause_s(10) == 5.0


def test_who_brings_tokens_can_run_and_is_forgiven() -> None:
    s = Supervisor(1, POLICY)
    for number in range(20):
        s.ready(0, 10.0 * number)
        s.worked(0)
        s.failed(0, 10.0 * number + 1)
        assert s.lives[0].failures == 1
        assert s.due(10.0 * number + 2) == [0]
    s.ready(0, 300.0)
    s.failed(0, 301.0)
    assert s.lives[0].failures == 2, "it was ready, and brought nothing"


def test_a_second_report_of_the_same_death_changes_nothing() -> None:
    s = Supervisor(1, POLICY)
    s.ready(0, 0.0)
    s.failed(0, 1.0)
    before = s.lives[0].due_s
    assert s.failed(0, 1.5) is State.WAITING
    assert (s.lives[0].failures, s.lives[0].due_s) == (1, before)


def test_hosts_that_do_not_come_are_waited_for_once_where_nobody_else_takes_requests() -> None:
    s = Supervisor(1, POLICY)
    s.ready(0, 5.0)
    assert s.failed(0, 10.0) is State.WAITING
    assert s.due(11.0) == [0]
    assert s.absent(0, 41.0) is State.GIVEN_UP
    assert s.hopeless and s.due(1e9) == []


def test_hosts_that_do_not_come_are_waited_for_as_long_as_others_take_requests() -> None:
    s = Supervisor(2, POLICY)
    s.ready(0, 1.0)
    s.ready(1, 1.0)
    s.failed(0, 10.0)
    now = 11.0
    for _ in range(3 * POLICY.most_failures):
        assert s.due(now) == [0]
        now += 30.0
        assert s.absent(0, now) is State.WAITING
    assert s.lives[0].failures == 1, "that its hosts are away is no failure of its own"
    s.failed(1, now)
    assert s.due(now) == [0]
    now += 30.0
    assert s.due(now) == [1]
    assert s.absent(0, now) is State.GIVEN_UP, "nobody took a request in all of that time"
    assert not s.hopeless, "the other one may yet come"
    assert s.absent(1, now + 30.0) is State.GIVEN_UP and s.hopeless


def test_a_pause_of_the_others_is_not_held_against_who_waits_for_hosts() -> None:
    s = Supervisor(2, POLICY)
    s.ready(0, 1.0)
    s.ready(1, 1.0)
    s.failed(0, 10.0)
    assert s.due(11.0) == [0]
    s.failed(1, 30.0)
    assert s.absent(0, 41.0) is State.WAITING, "the other one took requests for most of that time"


def test_nothing_is_started_after_stop() -> None:
    s = Supervisor(2, POLICY)
    s.ready(0, 0.0)
    s.failed(0, 1.0)
    s.stop()
    assert s.due(100.0) == [] and s.hopeless


def test_ready_twice_is_our_own_mistake() -> None:
    s = Supervisor(1, POLICY)
    s.ready(0, 0.0)
    with pytest.raises(AssertionError, match="while ready"):
        s.ready(0, 1.0)


def test_how_long_nobody_has_taken_requests() -> None:
    s = Supervisor(2, POLICY, now_s=5.0)
    assert s.stranded_s(7.0) == 2.0, "nobody has come up yet"
    s.ready(0, 8.0)
    s.ready(1, 8.0)
    s.failed(0, 10.0)
    assert s.stranded_s(20.0) == 0.0
    s.failed(1, 30.0)
    assert s.stranded_s(31.0) == 1.0
    s.due(99.0)
    s.ready(1, 100.0)
    assert s.stranded_s(101.0) == 0.0
