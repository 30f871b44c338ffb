"""run_ranks: what everybody's multi-process tests stand on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from lockstep.testing.ranks import RankError, RankPool, pool, run_ranks, run_ranks_outcomes
from lockstep.utils import procs

JOBS = "tests.distributed.ranks_jobs"


def test_arguments_and_results_keep_their_types():
    args = (1, (2, "three"), {"t": torch.arange(3)}, None)
    found = run_ranks(f"{JOBS}:plain", 2, *args, init=False, environ={"JOB_COLOUR": "blue"})
    for rank, (seen, size, got, initialised, threads, colour) in enumerate(found):
        assert (seen, size, initialised, threads, colour) == (rank, 2, False, 1, "blue")
        assert got[:2] == args[:2] and torch.equal(got[2]["t"], torch.arange(3)) and got[3] is None
    assert "JOB_COLOUR" not in os.environ
    assert all(report[3] for report in run_ranks(f"{JOBS}:plain", 2))


def test_ranks_are_fast_and_fresh():
    first = run_ranks(f"{JOBS}:pid", 2, init=False)
    started = time.monotonic()
    second = run_ranks(f"{JOBS}:pid", 2, init=False)
    assert time.monotonic() - started < 5
    assert len({*first, *second, pool.pid}) == 5


def test_the_culprit_is_reported_and_the_others_killed():
    started = time.monotonic()
    with pytest.raises(RankError, match=r"failed on rank 1 of 2: KeyError: 'the culprit'") as caught:
        run_ranks(f"{JOBS}:raises_on_one", 2, init=False)
    assert time.monotonic() - started < 20
    error = caught.value
    assert (error.rank, error.error_type) == (1, "KeyError") and "raises_on_one" in error.traceback
    assert "rank 1 says hello" in str(error) and "rank 0: killed" in str(error)


def test_a_killed_rank_is_named_with_its_signal():
    with pytest.raises(RankError, match="failed on rank 1 of 2: died: killed by SIGKILL"):
        run_ranks(f"{JOBS}:killed", 2, init=False)


def test_a_stuck_rank_shows_its_stack():
    with pytest.raises(RankError, match="failed on rank 1 of 2: timeout: still running after 1") as caught:
        run_ranks(f"{JOBS}:stuck", 2, init=False, timeout=1)
    assert "waits_for_nothing" in caught.value.traceback


def test_outcomes_let_every_rank_finish():
    fine, failed = run_ranks_outcomes(f"{JOBS}:stuck", 2, init=False, timeout=1)
    assert fine is None and isinstance(failed, RankError)


def test_children_of_ranks_are_killed():
    children = run_ranks(f"{JOBS}:leaves_children", 2, init=False)
    assert procs.wait_gone(children, 10) == []


def test_a_missing_function_is_said():
    with pytest.raises(RankError, match="has no attribute 'nothing'"):
        run_ranks(f"{JOBS}:nothing", 1, init=False)


@pytest.mark.chaos
@pytest.mark.parametrize("victim", ["parent", "zygote"])
def test_nothing_survives_parent_or_zygote(tmp_path, victim):
    code = (
        f"from lockstep.testing.ranks import run_ranks, pool\nimport threading\n"
        f"threading.Thread(target=run_ranks, args=('{JOBS}:pid', 2, {str(tmp_path)!r}), kwargs=dict(init=False), daemon=True).start()\n"
        "import time\nwhile pool.pid is None: time.sleep(0.01)\nprint(pool.pid, flush=True)\ntime.sleep(600)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    assert parent.stdout is not None
    zygote = int(parent.stdout.readline())
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    ranks = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert len(ranks) == 2
    os.kill(parent.pid if victim == "parent" else zygote, signal.SIGKILL)
    if victim == "parent":
        parent.wait()
    assert procs.wait_gone([zygote, *ranks], 10) == []
    parent.kill()
    parent.wait()
    parent.stdout.close()


def test_a_pool_of_ones_own_ends_when_closed():
    own = RankPool()
    reports = own.run(f"{JOBS}:pid", 1, [], 30, False, [], {}, "gloo", wait_all=False)
    assert reports[0]["ok"]
    zygote = own.pid
    assert zygote is not None
    own.close()
    own.close()
    assert not procs.alive(zygote)
