"""The multiprocess executor beyond the common contract: lateness, hangs, noise, and what it leaves behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lockstep.executor.contract import Executor, ExecutorError
from lockstep.executor.factory import make_executor
from lockstep.protocol import NewRequest, SamplingParams, StepPlan
from lockstep.testing.executors import FAKE_WORKER, SPEC, children_of, decode_plan, fake_config, fake_executor, wait_for
from lockstep.utils import procs


def pids(executor: Executor) -> list[int]:
    return [who["pid"] for who in executor.collective_rpc("who")]


def test_a_late_reply_is_never_taken_for_another_calls() -> None:
    with fake_executor(2) as executor:
        for round_ in range(3):
            with pytest.raises(TimeoutError, match="call misbehave_on: no answer from rank 1 after"):
                executor.collective_rpc("misbehave_on", (1, "sleep:0.4"), timeout=0.2)
            assert executor.collective_rpc("echo", (round_,), timeout=20) == [[0, [round_], {}], [1, [round_], {}]]
        assert executor.execute_model(decode_plan(4)).result(20).tokens == [4000, 4003]
        executor.check_health()


def test_waiting_for_a_step_can_time_out_and_go_on() -> None:
    with fake_executor(2) as executor:
        executor.collective_rpc("arm", (0, "sleep:0.5"))
        future = executor.execute_model(decode_plan(7))
        assert not future.done()
        with pytest.raises(TimeoutError, match=r"step 7: no answer from rank 0 after 0\.05 s"):
            future.result(0.05)
        assert future.result(20).step == 7


def test_results_that_nobody_fetches_wait_for_whom_they_concern() -> None:
    """More than their queue holds, for longer than a step may take: neither lost nor taken for a hang."""
    with fake_executor(2, step_s=0.6) as executor:
        futures = [executor.execute_model(decode_plan(step)) for step in range(1, 101)]
        time.sleep(1.5)
        executor.check_health()
        assert [f.result(20).step for f in reversed(futures)] == list(range(100, 0, -1))
        assert futures[7].result(20).step == 8, "a result can be asked for again"


def test_done_is_seen_without_waiting() -> None:
    with fake_executor(2) as executor:
        future = executor.execute_model(decode_plan(1))
        assert wait_for(future.done) and future.result(0).step == 1


def test_waiters_for_several_steps_each_get_theirs() -> None:
    with fake_executor(2) as executor:
        executor.collective_rpc("arm", (0, "sleep:0.05"))
        futures = [executor.execute_model(decode_plan(step)) for step in range(8)]
        found: dict[int, int] = {}
        threads = [threading.Thread(target=lambda i=i: found.update({i: futures[i].result(20).step})) for i in (7, 3, 5, 0, 1, 2, 6, 4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert found == {i: i for i in range(8)}


def test_all_who_wait_learn_of_a_failure_at_once() -> None:
    with fake_executor(2) as executor:
        executor.collective_rpc("arm", (0, "sleep:30"))
        futures = [executor.execute_model(decode_plan(step)) for step in range(2)]
        ended: list[str] = []

        def wait(i: int) -> None:
            with pytest.raises(ExecutorError) as caught:
                futures[i].result(20)
            ended.append(caught.value.kind)

        threads = [threading.Thread(target=wait, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        started = time.monotonic()
        executor.shutdown()
        for thread in threads:
            thread.join(20)
        assert ended == ["shutdown"] * 2 and time.monotonic() - started < 10


def test_an_exception_on_a_rank_that_does_not_report_arrives_at_once() -> None:
    with fake_executor(3) as executor:
        executor.collective_rpc("arm", (2, "raise:hidden"))
        executor.collective_rpc("arm", (0, "sleep:30"))  # as if stuck in the collective that rank 2 never enters
        started = time.monotonic()
        with pytest.raises(ExecutorError, match="rank 2 raised KeyError in step 1") as caught:
            executor.execute_model(decode_plan(1)).result(20)
        assert time.monotonic() - started < 5
        assert (caught.value.rank, caught.value.error_type) == (2, "KeyError")


def test_the_output_rank_is_the_first_of_the_last_stage() -> None:
    with fake_executor(2, pipeline_parallel_size=2) as executor:
        assert executor.execute_model(decode_plan(1)).result(20).tokens == [1000, 1003]
        executor.collective_rpc("arm", (2, "raise:here"))
        with pytest.raises(ExecutorError, match="rank 2"):
            executor.execute_model(decode_plan(2)).result(20)


def test_a_plan_larger_than_the_queue_arrives() -> None:
    long = NewRequest(0, "r", list(range(2_000_000)), 2_000_000, [], SamplingParams(), 0)
    with fake_executor(2) as executor:
        plan = StepPlan(1, [0], [0], [2_000_000], [True], new=[long])
        assert executor.execute_model(plan).result(60).tokens == [1000]


def test_ranks_have_their_own_cores_and_threads() -> None:
    cores = sorted(os.sched_getaffinity(0))
    with fake_executor(2) as executor:
        who = executor.collective_rpc("who")
    assert all(w["main"].endswith("worker_main.py") for w in who)
    if len(cores) >= 2:
        assert sorted(who[0]["cores"] + who[1]["cores"]) == cores
        assert [int(w["threads"]) for w in who] == [len(w["cores"]) for w in who]
    with fake_executor(2, cpu_binding=False, threads_per_rank=3) as executor:
        assert [(w["cores"], w["threads"]) for w in executor.collective_rpc("who")] == [(cores, "3")] * 2


def test_a_hang_names_the_rank_that_got_least_far_with_its_stack() -> None:
    with fake_executor(2, step_s=1.0) as executor:
        executor.collective_rpc("arm", (0, "collectives:3"))
        executor.collective_rpc("arm", (1, "sleep:100"))
        executor.execute_model(decode_plan(41)).result(20)
        with pytest.raises(ExecutorError) as caught:
            executor.collective_rpc("echo")
    error = caught.value
    assert (error.kind, error.rank, error.phase) == ("hung", 1, "step 41")
    assert "call echo made no progress for" in str(error)
    assert "rank 1 at step 41 collective 0" in str(error) and "Rank 1 got least far" in str(error)
    stacks = "\n".join(error.log_tail)
    assert "fake_worker.py" in stacks and "in misbehave" in stacks, "the Python stack of the stuck rank is in the tail"


def test_a_slow_step_that_makes_progress_is_not_a_hang() -> None:
    with fake_executor(2, step_s=0.6) as executor:
        executor.collective_rpc("arm", (0, "collectives:30"))
        started = time.monotonic()
        assert executor.execute_model(decode_plan(1)).result(30).step == 1
        assert time.monotonic() - started > 1.4


def test_a_busy_rank_that_cannot_beat_is_not_taken_for_stopped() -> None:
    with fake_executor(2) as executor:
        executor.collective_rpc("arm", (0, "spin:1.6"))
        assert executor.execute_model(decode_plan(1)).result(30).step == 1


def test_ranks_that_owe_an_answer_after_another_raised_end_the_executor() -> None:
    with fake_executor(2) as executor:
        executor.collective_rpc("arm", (0, "sleep:100"))
        started = time.monotonic()
        future = executor.execute_model(decode_plan(1))
        with pytest.raises(ExecutorError, match=r"rank 1 raised KeyError.*rank 0 did not answer the same call") as caught:
            executor.collective_rpc("misbehave_on", (1, "raise:alone"))
        assert time.monotonic() - started < 15
        assert caught.value.error_type == "KeyError"
        with pytest.raises(ExecutorError):
            future.result(1)


def test_a_start_that_takes_too_long_names_who_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_FAULT", "load:1:sleep=100")
    started = time.monotonic()
    with pytest.raises(ExecutorError, match=r"rank 1 not ready, startup_timeout_seconds=1\.5") as caught, fake_executor(2, startup_s=1.5):
        pass
    assert time.monotonic() - started < 15
    assert (caught.value.kind, caught.value.rank, caught.value.phase) == ("hung", 1, "load")


def test_a_slow_start_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_FAULT", "load:1:sleep=1.5")
    with fake_executor(2) as executor:
        assert len(executor.memory()) == 2


def test_shutdown_with_a_step_in_flight_is_quick_and_tells_the_waiter() -> None:
    with fake_executor(2) as executor:
        mine = pids(executor)
        executor.collective_rpc("arm", (0, "sleep:100"))
        future = executor.execute_model(decode_plan(1))
        started = time.monotonic()
        executor.shutdown()
        assert time.monotonic() - started < 10
        assert not any(procs.alive(pid) for pid in mine)
        with pytest.raises(ExecutorError) as caught:
            future.result(1)
        assert caught.value.kind == "shutdown"


def test_what_ranks_print_goes_to_standard_error_with_their_name() -> None:
    code = (
        "from lockstep.testing.executors import *\n"
        "import time\n"
        "with fake_executor(2) as e:\n"
        "    e.collective_rpc('say', ('hello there',)); time.sleep(0.3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ""
    assert "[rank 0] hello there\n" in done.stderr and "[rank 1] hello there\n" in done.stderr


def test_a_script_without_a_main_guard_works(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from lockstep.testing.executors import *\nprint('top')\nwith fake_executor(2) as e:\n    print(len(e.memory()))\n")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert done.stdout.split() == ["top", "2"]


def test_control_c_at_the_terminal_does_not_reach_the_ranks() -> None:
    with fake_executor(2) as executor:
        for pid in pids(executor):
            assert os.getsid(pid) != os.getsid(0)
            os.kill(pid, signal.SIGINT)
        assert len(executor.memory()) == 2


def test_an_executor_made_in_a_thread_that_ended_lives_on() -> None:
    made: list[Executor] = []
    thread = threading.Thread(target=lambda: made.append(make_executor(fake_config(2), SPEC, Path("."), worker_cls=FAKE_WORKER)))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert len(made[0].memory()) == 2
    made[0].shutdown()


def test_a_forgotten_executor_takes_its_ranks_along() -> None:
    executor = make_executor(fake_config(2), SPEC, Path("."), worker_cls=FAKE_WORKER)
    mine = pids(executor)
    del executor
    gc.collect()
    assert procs.wait_gone(mine, 10) == []


@pytest.mark.parametrize("ending", ["pass", "raise SystemExit(3)", "raise ValueError", "__import__('os')._exit(4)"])
def test_a_program_that_just_ends_leaves_nothing(ending: str) -> None:
    code = (
        "from lockstep.testing.executors import *\n"
        "e = make_executor(fake_config(2), SPEC, Path('.'), worker_cls=FAKE_WORKER)\n"
        f"print(*[w['pid'] for w in e.collective_rpc('who')], flush=True)\n{ending}\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert time.monotonic() - started < 20
    mine = [int(pid) for pid in done.stdout.split()]
    assert len(mine) == 2
    assert procs.wait_gone(mine, 5) == []


def test_the_exit_of_a_forked_child_leaves_the_ranks_alone() -> None:
    code = (
        "import os, sys\n"
        "from lockstep.testing.executors import *\n"
        "with fake_executor(2) as e:\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        sys.exit(0)\n"
        "    os.waitpid(pid, 0)\n"
        "    print(len(e.memory()), e.execute_model(decode_plan(1)).result(20).step)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["2", "1"]


def test_nothing_is_left_behind() -> None:
    """Descriptors, threads, children, shared memory and listening sockets, after good ends and bad."""

    def state() -> tuple[int, set[str], set[int], int]:
        return len(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm")), set(children_of(os.getpid())), threading.active_count()

    with fake_executor(2):
        pass
    gc.collect()
    before = state()
    for round_ in range(4):
        with fake_executor(2) as executor:
            assert not set(os.listdir("/dev/shm")) - before[1]
            if round_ % 2:
                os.kill(pids(executor)[round_ // 2], signal.SIGKILL)
                with pytest.raises(ExecutorError):
                    executor.collective_rpc("misbehave", ("sleep:5",))
    gc.collect()
    assert wait_for(lambda: state() == before, 5), (state(), before)


def test_no_socket_listens_while_fake_ranks_run() -> None:
    def listening(of: list[int]) -> set[str]:
        inodes = set()
        for pid in of:
            for fd in os.listdir(f"/proc/{pid}/fd"):
                try:
                    inodes.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
                except OSError:
                    continue
        rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
        return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}

    before = listening([os.getpid()])
    with fake_executor(2) as executor:
        assert listening([os.getpid(), *pids(executor)]) == before
