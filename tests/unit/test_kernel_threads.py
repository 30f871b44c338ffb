"""Threads of this process: sized and bound as the plan says, and the caller put back where it was."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lockstep.kernels import threads
from lockstep.kernels.library import library
from lockstep.utils.cores import RankCores

CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pytestmark = pytest.mark.skipif(len(CPUS) < 2 or library() is None, reason="needs two CPUs and the kernels")
PAIR = tuple(CPUS[:2])


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before, count = os.sched_getaffinity(0), torch.get_num_threads()
    library().team_set(1, 0, 0)  # no threads that an earlier test left
    yield
    os.sched_setaffinity(0, before)
    threads.take(RankCores((), count), own_process=False)
    library().team_set(1, 0, 0)


def masks() -> list[set[int]]:
    """The affinity of every thread of this process, the team's having begun to work."""
    kernels = library()
    program, step = kernels.program_new(), kernels.step_new()
    kernels.program_run(program, step, 0)
    kernels.program_free(program)
    kernels.step_free(step)
    return [os.sched_getaffinity(int(task.name)) for task in Path("/proc/self/task").iterdir()]


def test_the_team_is_on_its_lanes_and_the_caller_where_it_was() -> None:
    before = masks().count({PAIR[1]})
    threads.take(RankCores(PAIR, 2, PAIR), own_process=False)
    assert (library().team_size(), torch.get_num_threads()) == (2, 1)
    assert os.sched_getaffinity(0) == set(CPUS)
    assert masks().count({PAIR[1]}) == before + 1


def test_a_process_of_its_own_stays_on_its_lane_and_torchs_pool_does_not() -> None:
    seen = {}

    def rank() -> None:  # a thread of its own has a pool of its own, which starts inside take()
        before = {int(task.name) for task in Path("/proc/self/task").iterdir()}
        threads.take(RankCores(PAIR, 2, PAIR), own_process=True)
        seen["me"] = os.sched_getaffinity(0)
        torch.zeros(1 << 20).add_(1)
        masks()
        seen["new"] = [os.sched_getaffinity(int(t.name)) for t in Path("/proc/self/task").iterdir() if int(t.name) not in before]

    thread = threading.Thread(target=rank)
    thread.start()
    thread.join()
    assert seen["me"] == {PAIR[0]}
    assert {PAIR[1]} in seen["new"], "the team's second thread"
    assert {PAIR[0]} not in seen["new"], "a thread of torch's pool shares the caller's lane"


def test_a_seat_is_taken_for_a_while() -> None:
    share = RankCores(PAIR, 2, PAIR)
    threads.take(share, own_process=False)
    seat = threads.Seat(share)
    with seat:
        assert os.sched_getaffinity(0) == {PAIR[0]}
    assert os.sched_getaffinity(0) == set(CPUS)
    with pytest.raises(KeyError), seat:
        raise KeyError
    assert os.sched_getaffinity(0) == set(CPUS)


def test_a_pool_that_torch_starts_in_a_seat_is_not_in_it() -> None:
    """Another thread than the one before, or another size of the pool: the pool starts before the seat is taken."""
    share = RankCores(PAIR, 2, PAIR)
    threads.take(share, own_process=False)
    torch.set_num_threads(2)  # as the program around may
    seat = threads.Seat(share)
    with seat:
        pass
    before = {int(task.name) for task in Path("/proc/self/task").iterdir()}
    new: list[set[int]] = []

    def caller() -> None:
        with seat:
            torch.zeros(1 << 20).add_(1)
            new.extend(os.sched_getaffinity(int(t.name)) for t in Path("/proc/self/task").iterdir() if int(t.name) not in before)

    thread = threading.Thread(target=caller)
    thread.start()
    thread.join()
    assert sorted(map(len, new)) == [1, len(CPUS)], "the caller in its seat, the pool's thread wherever it likes"


def test_without_lanes_nobody_moves() -> None:
    share = RankCores((), 3, (), crowded=True, why="3 threads on 2 CPUs")
    threads.take(share, own_process=True)
    with threads.Seat(share):
        assert os.sched_getaffinity(0) == set(CPUS)
    assert library().team_size() == 3
