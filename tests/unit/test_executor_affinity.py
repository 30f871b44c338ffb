"""Who computes where."""

from __future__ import annotations

import os
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.executor.affinity import plan_cores
from lockstep.utils import cgroups, cores
from lockstep.utils.cores import RankCores, usable_cores

MACHINES = st.integers(1, 24).flatmap(lambda n: st.integers(1, 2).map(lambda smt: machine(n, smt)))


def machine(physical: int, smt: int = 1) -> list[tuple[int, ...]]:
    """Cores numbered as x86 numbers them: all first siblings, then all second ones."""
    return [tuple(core + physical * sibling for sibling in range(smt)) for core in range(physical)]


@given(cores=MACHINES, n_ranks=st.integers(1, 40), threads=st.none() | st.integers(1, 9), bind=st.booleans())
def test_a_plan_keeps_its_promises(cores: list[tuple[int, ...]], n_ranks: int, threads: int | None, bind: bool) -> None:
    plan = plan_cores(cores, n_ranks, threads, bind)
    cpus = list(chain(*cores))
    assert len(plan) == n_ranks
    for rank in plan:
        assert rank.threads == threads or (threads is None and rank.threads >= 1)
        assert len(set(rank.lanes)) == len(rank.lanes) and len(rank.lanes) in (0, rank.threads)
        assert bool(rank.lanes) == bool(rank.cores) or (rank.threads == 1 and len(rank.cores) > 1)
        assert set(rank.lanes) <= set(rank.cores)
        assert bool(rank.cores) != bool(rank.why), "bound, or a reason why not"
    taken = list(chain(*(rank.cores for rank in plan)))
    counts = Counter(taken)
    assert set(counts.values()) <= {max(1, n_ranks // len(cpus))}, "no core is two ranks', or every CPU of as many ranks"
    if threads is None and bind and n_ranks % len(cpus) == 0:
        assert set(counts) == set(cpus)
    elif n_ranks > len(cpus) and n_ranks % len(cpus):
        assert not taken, "where ranks do not come out even nobody is bound"
    assert plan[0].crowded == (sum(rank.threads for rank in plan) > len(cpus))
    if threads is None and bind and n_ranks <= len(cpus):
        assert sorted(taken) == sorted(cpus), "no core is left over"
        sizes = [rank.threads for rank in plan]
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
        assert sum(sizes) == max(len(cores), n_ranks), "one thread on each physical core, and one for each rank"


def test_an_uneven_rest_is_used() -> None:
    assert plan_cores(machine(3), 2) == [RankCores((0, 1), 2, (0, 1)), RankCores((2,), 1, (2,))]


def test_siblings_are_bound_to_and_not_computed_on() -> None:
    """4 cores of 2 CPUs each, on two ranks: 2 threads on 4 CPUs, one on each core."""
    assert plan_cores(machine(4, 2), 2)[1] == RankCores((2, 3, 6, 7), 2, (2, 3))


def test_threads_that_are_asked_for_fill_cores_before_siblings() -> None:
    assert plan_cores(machine(4, 2), 2, 3)[0] == RankCores((0, 1, 4, 5), 3, (0, 1, 4))


def test_one_thread_with_several_cores_may_use_any() -> None:
    assert plan_cores(machine(4), 2, 1)[1] == RankCores((2, 3), 1, ())


def test_more_ranks_than_cores_take_siblings_one_thread_each() -> None:
    assert [rank.cores for rank in plan_cores(machine(2, 2), 3)] == [(0, 2), (1,), (3,)]
    assert [rank.threads for rank in plan_cores(machine(2, 2), 3)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("n_ranks", "threads", "bind", "quota", "wanted"),
    [
        (2, 2, False, None, [RankCores((), 2, (), False, "cpu_binding is off")] * 2),
        (2, 4, True, None, [RankCores((0, 1, 2, 3), 4, (0, 1, 2, 3), True), RankCores((), 4, (), True, "4 threads on 3 CPUs")]),
        (8, None, True, None, [RankCores((), 1, (), True, "8 ranks on 7 CPUs")] * 8),
        (2, None, True, 3.5, [RankCores((), n, (), False, "the container may use 3.5 CPUs of 7, not which") for n in (2, 1)]),
        (1, None, True, 0.5, [RankCores((), 1, (), True, "the container may use 0.5 CPUs of 7, not which")]),
        (1, None, True, 8.0, [RankCores(tuple(range(7)), 7, tuple(range(7)))]),
    ],
)
def test_who_is_not_bound_is_told_why(n_ranks: int, threads: int | None, bind: bool, quota: float | None, wanted: list[RankCores]) -> None:
    assert plan_cores(machine(7), n_ranks, threads, bind, quota) == wanted


def test_ranks_that_come_out_even_share_cpus() -> None:
    plan = plan_cores(machine(2), 8)
    assert [rank.lanes for rank in plan] == [(0,), (1,)] * 4, "in turn: two stages of four ranks have both CPUs each"
    assert all(rank.threads == 1 and rank.crowded for rank in plan)


def test_no_rank_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="n_ranks=0"):
        plan_cores([(0,)], 0)


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_usable_cores_are_this_process_s() -> None:
    assert set(chain(*usable_cores())) == os.sched_getaffinity(0)


def test_siblings_and_neighbours_are_read_from_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packages of two cores of two CPUs, numbered crosswise."""
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}"
        (folder / "topology").mkdir(parents=True)
        (folder / "topology/physical_package_id").write_text(f"{cpu % 2}\n")
        (folder / "topology/thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
        (folder / f"node{cpu % 2}").mkdir()
    monkeypatch.setattr(cores, "_CPUS", tmp_path)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(8)) - {6}, raising=False)
    assert usable_cores() == [(0, 4), (2,), (1, 5), (3, 7)]


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({}, None),
        ({"cpu.cfs_quota_us": "300000", "cpu.cfs_period_us": "100000"}, 3.0),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_a_containers_quota_is_read(files: dict[str, str], wanted: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(cgroups, "folders", lambda controller: iter([(tmp_path, "cpu.max" in files), (tmp_path / "up", True)]))
    assert cores.quota() == wanted
