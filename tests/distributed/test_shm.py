"""Shared-memory groups: what they leave behind, how they fail, what they choose, and that waiting costs nothing."""

from __future__ import annotations

import os

import pytest

from lockstep.distributed.communicators.segment import RING_BYTES
from lockstep.testing.ranks import RankError, run_ranks, run_ranks_outcomes
from tests.distributed.shm_jobs import BIG, CALLS, DIFFERENT

J = "tests.distributed.shm_jobs"


@pytest.mark.parametrize("name", CALLS)
def test_a_killed_rank_is_named_within_seconds(name):
    first, second = run_ranks_outcomes(f"{J}:killed", 2, name)
    assert isinstance(second, RankError) and second.error_type == "died"
    assert not isinstance(first, RankError), first
    (text, took), (again, _) = first
    assert "rank 1 of group test (pid " in text and "is dead" in text and took < 5
    assert again == text  # the group stays failed


def test_all_ranks_learn_of_a_death():
    outcomes = run_ranks_outcomes(f"{J}:killed", 4, "all_reduce")
    for rank in (0, 2, 3):
        (text, took), _ = outcomes[rank]
        assert "rank 1" in text and "dead" in text and took < 5


def test_a_late_rank_is_named_and_told():
    outcomes = run_ranks(f"{J}:late", 3)
    for (text, took), (again, _) in (outcomes[0], outcomes[2]):
        assert text.startswith("barrier: ") and 0.4 < took < 10 and again == text
        assert "has not come in 0.5 s" in text or "has failed: barrier" in text  # its own patience ended, or another's did
    assert any(
        "rank 1 of group test" in outcomes[r][0][0] and "last entered broadcast of 16 bytes of float32" in outcomes[r][0][0] for r in (0, 2)
    )
    text, took = outcomes[1]
    assert "has failed" in text and "rank 1" in text and took < 5


def test_a_rank_that_left_is_named():
    text, took = run_ranks(f"{J}:left", 2)[0]
    assert "rank 1 of group test" in text and "has left the group" in text and took < 5


@pytest.mark.parametrize("what", DIFFERENT)
def test_ranks_that_differ_are_told(what):
    outcomes = run_ranks(f"{J}:different", 2, what)
    text = outcomes[0][0]
    if what == "rows":
        assert "rank 1 sends 8 bytes to rank 0, which expects 4" in text
        return
    assert "rank 0" in text and "rank 1" in text
    wanted = {
        "operation": ("all_reduce of 16 bytes of float32", "all_gather of 32 bytes of float32"),
        "size": ("all_reduce of 16 bytes", "all_reduce of 20 bytes"),
        "dtype": ("16 bytes of float32", "16 bytes of bfloat16"),
        "source": ("broadcast of 16 bytes of float32 from place 0", "from place 1"),
        "destination": ("gather of 32 bytes of float32 to place 0", "to place 1"),
        "shares": ("all_gather of 16 bytes of float32 in uneven shares (no. ", "), rank"),
        "summed shares": ("reduce_scatter of 16 bytes of float32 in uneven shares (no. ",),
        "transfer": ("send of 16 bytes", "send of 20 bytes"),
    }[what]
    assert all(part in text for part in wanted)
    if what != "transfer":
        assert all(part in outcomes[1][0] for part in wanted)


def test_a_rank_that_dies_on_another_host_is_named_everywhere():
    """Hosts a, a, b, b; rank 3 is killed while its leader, rank 2, and the other host's ranks wait."""
    outcomes = run_ranks_outcomes(f"{J}:lost_beyond", 4, "aabb", "killed")
    assert isinstance(outcomes[3], RankError)
    text, took = outcomes[2]
    assert "rank 3 of group test (pid " in text and "is dead" in text and took < 10, text
    for rank in (0, 1):
        text, took = outcomes[rank]
        assert "rank 2, on another host, is gone or late: rank 0 waited" in text and took < 10, text


def test_a_late_rank_of_another_host_is_named_everywhere():
    """Hosts a, a, b; patience is 1 s. Rank 1 waits for its leader, and is told what the leader waited for."""
    outcomes = run_ranks_outcomes(f"{J}:lost_beyond", 3, "aab", "late")
    for rank in (0, 1):
        text, took = outcomes[rank]
        assert "rank 2, on another host, is gone or late: rank 0 waited for it, at most 1 s" in text and took < 3.5, text


@pytest.mark.parametrize("call", ["barrier", "recv"])
def test_control_c_ends_a_wait(call):
    """The signal's exception comes out of the wait, and the ranks it leaves alone are told."""
    first, second = run_ranks(f"{J}:interrupted", 2, call)
    kind, took, after = first
    assert kind == "KeyboardInterrupt" and took < 3 and "rank 0 of group test" in after and "interrupted by a signal" in after
    assert "rank 0" in second and "interrupted by a signal" in second


@pytest.mark.parametrize("how", ["sleeps", "as chosen"])
def test_waiting_ranks_sleep(how):
    used = run_ranks(f"{J}:waiting", 8, how)
    assert max(used[1:]) < 0.15, used  # of 1.5 s


def test_nothing_is_left_behind():
    before = set(os.listdir("/dev/shm"))
    for found in run_ranks(f"{J}:traces", 2):
        assert found["named"] == [] and found["descriptors"] == 0
        assert found["mapped"] > 0 and found["mapped after"] < found["mapped"]
    assert run_ranks(f"{J}:traces", 2)[1]["modes"] == [0o600]
    run_ranks_outcomes(f"{J}:killed", 2, "all_reduce")
    assert set(os.listdir("/dev/shm")) <= before


def test_who_cannot_open_the_segment_keeps_all_from_it():
    for text in run_ranks(f"{J}:cannot_open", 3):
        assert text.startswith("gloo: no shared memory: rank 1: ") and "Permission denied" in text
    for text in run_ranks(f"{J}:cannot_open", 2, environ={"LOCKSTEP_COMMUNICATOR": "shm"}):
        assert text.startswith("ValueError: LOCKSTEP_COMMUNICATOR=shm") and "rank 1: " in text


def test_another_memory_is_noticed():
    assert run_ranks(f"{J}:memory_is_shared", 2) == [True, True]


def test_the_choice():
    assert all(text.startswith("shm: 2 ranks on one host") for text in run_ranks(f"{J}:chosen", 2, "aa"))
    found = run_ranks(f"{J}:chosen", 3, "aba")
    assert [text.split(";")[0] for text in found] == [f"hierarchical: 3 ranks on 2 hosts, {n} of them here" for n in (2, 1, 2)]
    assert all(text == "gloo: no shared memory: every rank has a host of its own" for text in run_ranks(f"{J}:chosen", 2, "ab"))
    for name, start in (("gloo", "gloo: LOCKSTEP_COMMUNICATOR says so"), ("hierarchical", "hierarchical: 2 ranks on 1 host,")):
        assert run_ranks(f"{J}:chosen", 2, "aa", environ={"LOCKSTEP_COMMUNICATOR": name})[0].startswith(start)
    with pytest.raises(RankError, match="its ranks are on 2 hosts"):
        run_ranks(f"{J}:chosen", 3, "aab", environ={"LOCKSTEP_COMMUNICATOR": "shm"})
    with pytest.raises(RankError, match="LOCKSTEP_COMMUNICATOR=mpi is not known: use one of auto"):
        run_ranks(f"{J}:chosen", 2, "aa", environ={"LOCKSTEP_COMMUNICATOR": "mpi"})
    assert run_ranks(f"{J}:chosen", 2, "aa", environ={"LOCKSTEP_KERNELS": "torch"})[0].endswith("rank 0: it has no kernel library")
    assert "sleep, since 8 ranks share" in run_ranks(f"{J}:chosen", 8, "a" * 8)[0] or (os.cpu_count() or 1) >= 8


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_may_send_before_they_receive(world_size):
    assert BIG * 4 > RING_BYTES
    run_ranks(f"{J}:both_send_first", world_size)


def test_a_send_that_nobody_waits_for_arrives():
    assert run_ranks(f"{J}:nobody_waits", 2)[1] < 2.5


def test_sends_and_collectives_cross():
    run_ranks(f"{J}:crossing", 3)


@pytest.mark.parametrize("world_size", [2, 3, pytest.param(5, marks=pytest.mark.full), pytest.param(8, marks=pytest.mark.full)])
def test_the_bits_do_not_depend_on_the_way(world_size):
    run_ranks(f"{J}:one_way_or_another", world_size)


@pytest.mark.parametrize("world_size", [2, 3, 5, pytest.param(8, marks=pytest.mark.full)])
def test_the_bits_of_products_do_not_depend_on_the_way(world_size):
    run_ranks(f"{J}:products_one_way_or_another", world_size)
