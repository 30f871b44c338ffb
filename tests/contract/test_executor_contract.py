"""What every executor promises the engine, tested on each of them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.config.errors import ConfigError
from lockstep.executor.contract import Executor, ExecutorError, RankMemory
from lockstep.executor.factory import make_executor
from lockstep.testing.executors import FAKE_WORKER, SPEC, decode_plan, fake_config, fake_executor, prefill_plan

WORLDS = {"uni": 1, "mp1": 1, "mp2": 2, "mp3": 3}


@pytest.fixture(params=list(WORLDS))
def world(request: pytest.FixtureRequest) -> int:
    return WORLDS[request.param]


@pytest.fixture
def executor(request: pytest.FixtureRequest, world: int) -> Iterator[Executor]:
    backend = "uni" if request.node.callspec.params["world"] == "uni" else "mp"
    with fake_executor(world, backend=backend) as made:
        yield made


def test_memory_is_by_rank(executor: Executor, world: int) -> None:
    memory = executor.memory()
    assert all(isinstance(m, RankMemory) for m in memory)
    assert [(m.rank, m.weight_bytes) for m in memory] == [(r, 1000 + r) for r in range(world)]


def test_initialize_kv_cache_reaches_every_rank(executor: Executor, world: int) -> None:
    executor.initialize_kv_cache(7)
    assert [m.kv_bytes for m in executor.memory()] == [7 * 64] * world


def test_steps_run_on_every_rank_in_order(executor: Executor, world: int) -> None:
    for step in range(20):
        plan = prefill_plan(step) if step % 5 == 0 else decode_plan(step)
        result = executor.execute_model(plan).result(20)
        assert (result.step, result.tokens) == (step, [step * 1000, step * 1000 + 3])
    assert executor.collective_rpc("seen_steps") == [list(range(20))] * world


def test_steps_may_be_in_flight_up_to_the_maximum(executor: Executor) -> None:
    assert executor.max_concurrent_batches >= 1
    executor.collective_rpc("arm", (0, "sleep:0.1"))
    futures = [executor.execute_model(decode_plan(step)) for step in range(executor.max_concurrent_batches)]
    last = futures[-1].result(20)
    assert last.step == executor.max_concurrent_batches - 1
    assert all(f.done() for f in futures), "a later step never completes before an earlier one"
    assert [f.result(20).step for f in futures] == list(range(len(futures)))


def test_a_plan_reaches_the_workers_unchanged(executor: Executor) -> None:
    plan = prefill_plan(0)
    executor.execute_model(plan).result(20)
    assert plan == prefill_plan(0)


def test_rpc_passes_plain_data_both_ways(executor: Executor, world: int) -> None:
    args = (1, -2.5, "text", True, None, [1, [2]], {"a": [1]}, b"raw", 2**40)
    got = executor.collective_rpc("echo", args, {"key": {"x": 1}})
    assert got == [[r, [1, -2.5, "text", True, None, [1, [2]], {"a": [1]}, b"raw", 2**40], {"key": {"x": 1}}] for r in range(world)]


def test_an_exception_in_a_call_is_typed_and_survived(executor: Executor, world: int) -> None:
    for _ in range(3):
        with pytest.raises(ExecutorError, match="raised KeyError in call misbehave: 'oops'") as caught:
            executor.collective_rpc("misbehave", ("raise:oops",))
        error = caught.value
        assert (error.kind, error.error_type, error.phase) == ("raised", "KeyError", "call misbehave")
        assert error.rank in range(world) and error.exitcode is None
        assert any("raise KeyError(value)" in line for line in error.log_tail), "the traceback is in the tail"
    assert [v[0] for v in executor.collective_rpc("echo", ("next",))] == list(range(world))
    executor.check_health()


def test_an_exception_on_one_rank_never_shifts_replies(executor: Executor, world: int) -> None:
    last = world - 1
    with pytest.raises(ExecutorError) as caught:
        executor.collective_rpc("misbehave_on", (last, "raise:oops"))
    assert caught.value.rank == last
    assert executor.collective_rpc("echo", ("second",)) == [[r, ["second"], {}] for r in range(world)]


def test_an_unknown_method_is_an_error_of_the_call(executor: Executor) -> None:
    with pytest.raises(ExecutorError) as caught:
        executor.collective_rpc("no_such_method")
    assert caught.value.error_type == "AttributeError"
    executor.check_health()


def test_a_private_method_is_refused(executor: Executor) -> None:
    with pytest.raises(ValueError, match="'__init__' is private"):
        executor.collective_rpc("__init__")


def test_a_result_that_is_not_plain_data_fails_only_its_call(executor: Executor, world: int) -> None:
    for _ in range(2):
        with pytest.raises(ExecutorError) as caught:
            executor.collective_rpc("unencodable")
        assert caught.value.kind == "raised" and caught.value.error_type == "TypeError"
        assert executor.collective_rpc("echo", (1,)) == [[r, [1], {}] for r in range(world)]


def test_an_argument_that_is_not_plain_data_is_the_callers_error(executor: Executor, world: int) -> None:
    with pytest.raises(TypeError):
        executor.collective_rpc("echo", (object(),))
    assert executor.collective_rpc("echo", (1,)) == [[r, [1], {}] for r in range(world)]


def test_an_exception_in_a_step_ends_the_executor(executor: Executor) -> None:
    failures: list[ExecutorError] = []
    called = threading.Event()

    def on_failure(error: ExecutorError) -> None:
        failures.append(error)
        called.set()

    executor.register_failure_callback(on_failure)
    executor.execute_model(decode_plan(0)).result(20)
    executor.collective_rpc("arm", (0, "raise:bad row"))
    future = executor.execute_model(decode_plan(1))
    with pytest.raises(ExecutorError, match="rank 0 raised KeyError in step 1: 'bad row'") as caught:
        future.result(20)
    error = caught.value
    assert (error.rank, error.kind, error.error_type, error.phase) == (0, "raised", "KeyError", "step 1")
    for later in (
        lambda: executor.execute_model(decode_plan(2)).result(20),
        lambda: executor.collective_rpc("echo"),
        executor.memory,
        executor.check_health,
    ):
        with pytest.raises(ExecutorError) as again:
            later()
        assert again.value is error
    assert called.wait(10)
    late: list[ExecutorError] = []
    executor.register_failure_callback(late.append)
    assert failures == [error] and late == [error]


def test_shutdown_is_final_and_may_be_called_twice(executor: Executor) -> None:
    failures: list[ExecutorError] = []
    executor.register_failure_callback(failures.append)
    executor.shutdown()
    executor.shutdown()
    with pytest.raises(ExecutorError) as caught:
        executor.execute_model(decode_plan(0)).result(1)
    assert caught.value.kind == "shutdown"
    with pytest.raises(ExecutorError):
        executor.check_health()
    assert failures == []


def test_results_do_not_alias_what_the_caller_holds(executor: Executor) -> None:
    mine = [1, 2]
    got = executor.collective_rpc("echo", (mine,))
    got[0][1][0].append(3)
    assert mine == [1, 2]


def test_a_failing_constructor_names_phase_and_type() -> None:
    for backend in ("uni", "mp"):
        with pytest.raises(ExecutorError) as caught:
            make_executor(fake_config(1, backend=backend), SPEC, Path("."), worker_cls="lockstep.testing.fake_worker:NoSuchClass")
        assert (caught.value.kind, caught.value.error_type) == ("raised", "AttributeError")


@pytest.mark.parametrize(("tp", "wanted"), [(1, "UniprocExecutor"), (2, "MultiprocExecutor")])
def test_the_default_backend_follows_the_number_of_ranks(tp: int, wanted: str) -> None:
    with fake_executor(tp) as executor:
        assert type(executor).__name__ == wanted


@pytest.mark.parametrize(("tp", "backend", "message"), [(2, "uni", "runs one rank"), (1, "carrier-pigeon", "'uni', 'mp'")])
def test_an_unfitting_backend_is_refused(tp: int, backend: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_executor(fake_config(tp, backend=backend), SPEC, Path("."), worker_cls=FAKE_WORKER)


def test_the_driver_and_fake_ranks_load_no_torch() -> None:
    code = (
        "import sys; from lockstep.testing.executors import *\n"
        "with fake_executor(2) as e:\n"
        "    assert not any(w['torch'] for w in e.collective_rpc('who'))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_two_executors_live_side_by_side() -> None:
    with fake_executor(2) as one, fake_executor(2) as two:
        one.initialize_kv_cache(3)
        two.initialize_kv_cache(5)
        for step in range(5):
            futures = one.execute_model(decode_plan(step)), two.execute_model(decode_plan(step))
            assert [f.result(20).step for f in futures] == [step, step]
        assert [m.kv_bytes for m in one.memory() + two.memory()] == [192, 192, 320, 320]
        pids = [w["pid"] for w in one.collective_rpc("who") + two.collective_rpc("who")]
        assert len(set(pids)) == 4 and os.getpid() not in pids
        one.shutdown()
        assert two.execute_model(decode_plan(5)).result(20).step == 5


def test_starting_is_quick() -> None:
    """Fake ranks import nothing heavy, so this is the executor's own share of start-up."""
    best = float("inf")
    for _ in range(3):
        started = time.monotonic()
        with fake_executor(2):
            best = min(best, time.monotonic() - started)
    assert best < 2.0
