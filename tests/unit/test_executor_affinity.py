"""Who computes where."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.executor.affinity import RankCores, plan_cores


@given(cores=st.lists(st.integers(0, 500), unique=True, max_size=64), n_ranks=st.integers(1, 16))
def test_cores_are_shared_out_evenly_and_completely(cores: list[int], n_ranks: int) -> None:
    plan = plan_cores(cores, n_ranks)
    assert len(plan) == n_ranks
    if len(cores) < n_ranks:
        assert plan == [RankCores((), 1)] * n_ranks
        return
    assert [c for rank in plan for c in rank.cores] == cores
    sizes = [len(rank.cores) for rank in plan]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    assert [rank.threads for rank in plan] == sizes


@pytest.mark.parametrize(
    ("threads", "bind", "wanted"),
    [
        (2, True, [((0, 1, 2, 3), 2), ((4, 5, 6), 2)]),
        (4, True, [((0, 1, 2, 3), 4), ((), 4)]),
        (None, False, [((), 4), ((), 3)]),
        (9, True, [((), 9), ((), 9)]),
    ],
)
def test_threads_and_binding_can_be_set(threads: int | None, bind: bool, wanted: list[tuple[tuple[int, ...], int]]) -> None:
    assert plan_cores(list(range(7)), 2, threads, bind) == [RankCores(*w) for w in wanted]


def test_no_rank_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="n_ranks=0"):
        plan_cores([0], 0)
