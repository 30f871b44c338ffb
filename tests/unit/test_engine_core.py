"""The engine's loop: steps in flight, failures, shutdown, and that it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from lockstep.engine.core import EngineCore
from lockstep.engine.errors import RequestError
from lockstep.executor.contract import ExecutorError
from lockstep.protocol import EngineRequest, SamplingParams, StepPlan
from lockstep.testing.fakes import ByteTokenizer, FakeExecutor, FakeFuture, generate

SPEC = ModelSpec("LlamaForCausalLM", 64, 2, 4, 2, 16, 128, 258, 256)
ROOT = Path(__file__).resolve().parents[2]


def engine(executor: FakeExecutor, *, asynchronous: bool = True, blocks: int | None = 64) -> EngineCore:
    config = EngineConfig(
        model=ModelConfig(max_model_len=64),
        cache=CacheConfig(num_gpu_blocks_override=blocks),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, async_scheduling=asynchronous),
    )
    return EngineCore(config, SPEC, executor)


def request(name: str, prompt: str = "hello", **sampling) -> EngineRequest:
    tokenizer = ByteTokenizer()
    params = SamplingParams(**{"max_tokens": 6, **sampling})
    return EngineRequest(
        request_id=name, prompt_token_ids=tokenizer.encode(prompt), sampling=params, seed=1, eos_token_ids=[tokenizer.eos_token_id]
    )


def test_it_generates_what_the_model_would():
    core = engine(FakeExecutor())
    wanted = [request("a", "abc"), request("b", "abd", min_tokens=2), request("c", "a" * 40)]
    for r in wanted:
        core.add_request(r)
    got: dict[str, list[int]] = {}
    while core.has_unfinished():
        for out in core.step():
            got.setdefault(out.request_id, []).extend(out.new_token_ids)
    assert got == {r.request_id: generate(r, 258, 64)[0] for r in wanted}


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_as_many_steps_are_in_flight_as_the_executor_allows(depth):
    class Recorder(FakeExecutor):
        def execute_model(self, plan: StepPlan) -> FakeFuture:
            future = super().execute_model(plan)
            self.most = max(getattr(self, "most", 0), len(self._pending))
            return future

    executor = Recorder(max_concurrent_batches=depth)
    core = engine(executor)
    core.add_request(request("a"))
    while core.has_unfinished():
        core.step()
    assert executor.most == depth == core.depth


def test_without_async_scheduling_a_step_ends_before_the_next_is_planned():
    core = engine(FakeExecutor(max_concurrent_batches=3), asynchronous=False)
    core.add_request(request("a"))
    assert core.depth == 1
    (out,) = core.step()
    assert len(out.new_token_ids) == 1 and core.stats().steps_in_flight == 0


def test_the_next_step_is_issued_before_the_oldest_is_waited_for():
    events: list[str] = []

    class Recorder(FakeExecutor):
        def execute_model(self, plan: StepPlan) -> FakeFuture:
            events.append(f"issue {plan.step}")
            return super().execute_model(plan)

        def deliver(self, future, plan, result):
            events.append(f"wait {plan.step}")
            return super().deliver(future, plan, result)

    core = engine(Recorder(max_concurrent_batches=2))
    core.add_request(request("a", max_tokens=4))
    while core.has_unfinished():
        core.step()
    assert events == ["issue 0", "issue 1", "wait 0", "issue 2", "wait 1", "issue 3", "wait 2", "wait 3"]


class Timed(FakeExecutor):
    """Each step takes `takes_s` on a clock of its own, which only waiting moves."""

    def __init__(self, **options) -> None:
        super().__init__(max_concurrent_batches=2, **options)
        self.now_s, self.takes_s, self.ends_s = 0.0, 0.1, 0.0
        self.issued_s: list[tuple[float, float]] = []  # of each step: when it was issued, and when it was to end

    def execute_model(self, plan: StepPlan) -> FakeFuture:
        future = super().execute_model(plan)
        self.ends_s = max(self.ends_s, self.now_s) + self.takes_s
        self.issued_s.append((self.now_s, self.ends_s))
        return future

    def wait(self, plan: StepPlan, timeout: float | None) -> None:
        _, ends_s = self.issued_s[plan.step]
        if timeout is not None and self.now_s + timeout < ends_s:
            self.now_s += timeout + 1e-6
            raise TimeoutError
        self.now_s = max(self.now_s, ends_s)


def timed(**options) -> tuple[EngineCore, Timed]:
    """An engine that plans just in time, and knows how long its steps take."""
    executor = Timed(vocab_size=258)
    config = EngineConfig(
        model=ModelConfig(max_model_len=512),
        cache=CacheConfig(num_gpu_blocks_override=256),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64),
    )
    core = EngineCore(config, SPEC, executor, just_in_time=True, clock=lambda: executor.now_s)
    core.add_request(request("a", max_tokens=200, ignore_eos=True))
    while len(executor.plans) < 40:
        core.step()
    return core, executor


def test_just_in_time_a_request_joins_the_step_after_the_one_that_runs():
    core, executor = timed()
    while executor.ends_s - executor.now_s < 0.09:  # to the beginning of a step
        core.step()
    running = len(executor.plans)
    assert core.stats().steps_in_flight == 1
    core.add_request(request("b"))
    while len(executor.plans) == running:
        core.step()
    assert [new.request_id for new in executor.plans[running].new] == ["b"]
    issued_s, _ = executor.issued_s[running]
    begins_s = executor.issued_s[running - 1][1]
    assert begins_s - 0.03 < issued_s < begins_s, "it was handed over shortly before the ranks were free"


def test_just_in_time_a_step_that_ends_early_is_followed_at_once():
    core, executor = timed()
    executor.takes_s = 0.01  # where 0.1 are expected
    core.add_request(request("b", max_tokens=2))
    for _ in range(30):
        core.step()
    assert len(executor.plans) > 55
    for (_, ended_s), (issued_s, _) in zip(executor.issued_s[41:], executor.issued_s[42:], strict=False):
        assert issued_s <= ended_s + 1e-9, "the ranks waited"


def test_just_in_time_changes_no_token():
    executor = Timed(vocab_size=258)
    wanted = [request("a", "abc"), request("b", "abd", min_tokens=2), request("c", "a" * 40)]
    config = EngineConfig(
        model=ModelConfig(max_model_len=64),
        cache=CacheConfig(num_gpu_blocks_override=64),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64),
    )
    core = EngineCore(config, SPEC, executor, just_in_time=True, clock=lambda: executor.now_s)
    got: dict[str, list[int]] = {}
    todo = list(wanted)
    while todo or core.has_unfinished():
        if todo:
            core.add_request(todo.pop(0))
        for out in core.step():
            got.setdefault(out.request_id, []).extend(out.new_token_ids)
    assert got == {r.request_id: generate(r, 258, 64)[0] for r in wanted}


def test_step_without_work_does_nothing():
    executor = FakeExecutor()
    core = engine(executor)
    assert core.step() == [] and executor.plans == [] and not core.has_unfinished()


def test_a_refused_request_leaves_the_others_alone():
    core = engine(FakeExecutor())
    core.add_request(request("a"))
    with pytest.raises(RequestError):
        core.add_request(request("b", "x" * 64))
    with pytest.raises(ValueError, match="in use"):
        core.add_request(request("a"))
    outs = []
    while core.has_unfinished():
        outs += core.step()
    assert [t for out in outs for t in out.new_token_ids] == generate(request("a"), 258, 64)[0]


def test_abort_ends_with_the_next_step_even_when_nothing_else_runs():
    core = engine(FakeExecutor(max_concurrent_batches=2))
    core.add_request(request("a", max_tokens=50))
    core.step()
    core.abort(["a", "unknown"])
    assert core.stats().kv_blocks_used == 0
    outs = []
    while core.has_unfinished():
        outs += core.step()
    assert [(o.request_id, o.finish_reason) for o in outs] == [("a", "abort")]
    assert core.stats().steps_in_flight == 0


def test_one_sick_row_ends_one_request():
    executor = FakeExecutor(max_concurrent_batches=2, sick=lambda name, position: name == "bad" and position == 7)
    core = engine(executor)
    for name in ("bad", "good"):
        core.add_request(request(name, max_tokens=6))
    ends, tokens = {}, []
    while core.has_unfinished():
        for out in core.step():
            tokens += out.new_token_ids if out.request_id == "good" else []
            if out.finish_reason:
                ends[out.request_id] = out
    assert ends["bad"].finish_reason == "error" and ends["good"].finish_reason == "length"
    assert tokens == generate(request("good"), 258, 64)[0]
    core.add_request(request("next"))
    assert core.step()[0].request_id == "next", "the engine lives on"


@pytest.mark.parametrize("on", ["issue", "result"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_failed_executor_ends_every_request_once_and_then_raises_the_same_error(on, depth):
    core = engine(FakeExecutor(max_concurrent_batches=depth, fail_at_step=2, fail_on=on))
    for i in range(6):  # two of them wait for a slot
        core.add_request(request(f"r{i}", "hello" * i + "x"))
    outs = []
    while core.has_unfinished():
        outs += core.step()
    ends = [out for out in outs if out.finish_reason]
    assert sorted(out.request_id for out in ends) == [f"r{i}" for i in range(6)]
    assert all(out.finish_reason == "error" and out.error == "rank 0 died in step 2" for out in ends)
    for call in (core.step, core.check_health, lambda: core.add_request(request("late"))):
        with pytest.raises(ExecutorError, match="rank 0 died in step 2") as caught:
            call()
        assert caught.value is core.failure and caught.value.rank == 0 and caught.value.exitcode == -9
    core.abort(["r0"])
    core.shutdown()
    core.shutdown()
    with pytest.raises(ExecutorError, match="rank 0 died"):
        core.step()


def test_a_step_that_never_ends_is_a_failure_that_says_so():
    class Stuck(FakeExecutor):
        def deliver(self, future, plan, result):
            raise TimeoutError("rank 1 is in collective 14 since 310 s")

    core = engine(Stuck())
    core.add_request(request("a"))
    (out,) = core.step()
    assert out.finish_reason == "error"
    assert "step 0 gave no result" in out.error and "rank 1 is in collective 14" in out.error
    with pytest.raises(ExecutorError) as caught:
        core.step()
    assert caught.value.kind == "hung" and caught.value.phase == "step 0"


def test_results_are_waited_for_a_little_longer_than_the_executor_waits():
    waits = []

    class Future(FakeFuture):
        def result(self, timeout=None):
            waits.append(timeout)
            return super().result(timeout)

    class Recorder(FakeExecutor):
        def execute_model(self, plan):
            future = super().execute_model(plan)
            future.__class__ = Future
            return future

    config = EngineConfig(
        model=ModelConfig(max_model_len=64),
        parallel=ParallelConfig(execute_model_timeout_seconds=7.0),
        cache=CacheConfig(num_gpu_blocks_override=8),
    )
    core = EngineCore(config, SPEC, Recorder())
    core.add_request(request("a", max_tokens=1))
    core.step()
    assert waits == [17.0]


def test_our_own_fault_is_raised_and_the_requests_are_told():
    class Liar(FakeExecutor):
        def deliver(self, future, plan, result):
            result.tokens.append(3)
            return super().deliver(future, plan, result)

    core = engine(Liar())
    core.add_request(request("a"))
    with pytest.raises(AssertionError, match="2 tokens for 1 sampled rows"):
        core.step()
    (out,) = core.step()
    assert (out.request_id, out.finish_reason) == ("a", "error") and "2 tokens for 1" in out.error
    with pytest.raises(ExecutorError) as caught:
        core.step()
    assert (caught.value.kind, caught.value.error_type) == ("raised", "AssertionError")


def test_shutdown_aborts_what_is_left_and_stops_the_executor():
    executor = FakeExecutor(max_concurrent_batches=2)
    core = engine(executor)
    core.add_request(request("a"))
    core.step()
    core.shutdown()
    assert executor.is_shut_down
    assert [(o.request_id, o.finish_reason) for o in core.step()] == [("a", "abort")]
    assert not core.has_unfinished()
    with pytest.raises(ExecutorError, match="shut down") as caught:
        core.add_request(request("b"))
    assert caught.value.kind == "shutdown"


def test_every_none_of_the_configuration_is_filled():
    core = EngineCore(EngineConfig(), SPEC, FakeExecutor())
    config = core.config
    assert config.model.max_model_len == 256
    assert config.scheduler.max_num_batched_tokens == 2048
    assert config.scheduler.max_num_seqs == core.memory.max_num_seqs == 256
    assert config.cache.num_gpu_blocks_override == core.memory.num_blocks == 4096
    assert core.stats().kv_blocks == 4096


def test_stats_tell_what_happens():
    core = engine(FakeExecutor())
    for i in range(5):
        core.add_request(request(f"r{i}", chr(65 + i) * 20, max_tokens=2))
    assert (core.stats().running, core.stats().waiting, core.stats().kv_usage) == (0, 5, 0.0)
    core.step()
    stats = core.stats()
    assert (stats.running, stats.waiting, stats.steps, stats.scheduled_tokens) == (4, 1, 1, 64)
    assert stats.kv_blocks_used == 7 and stats.kv_usage == 7 / 64
    while core.has_unfinished():
        core.step()
    stats = core.stats()
    assert (stats.finished, stats.generated_tokens, stats.kv_blocks_used, stats.preemptions) == (5, 10, 0, 0)
    core.add_request(request("again", "A" * 20, max_tokens=2))
    while core.has_unfinished():
        core.step()
    assert core.stats().prefix_hit_tokens == 16 and core.stats().prefix_hit_rate == 16 / 120


def test_the_engine_imports_without_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import lockstep.engine.core, lockstep.testing.fakes\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('numpy', 'transformers')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def test_the_overhead_benchmark_reports_what_it_claims():
    command = [sys.executable, str(ROOT / "benchmarks/engine_overhead.py"), "--running", "8", "--steps", "50"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=ROOT)
    report = json.loads(ran.stdout)
    assert report["running"] == 8 and report["steps"] == 50
    assert 0 < report["step_ms"]["median"] <= report["step_ms"]["p99"] <= report["step_ms"]["max"]
    failing = subprocess.run([*command, "--max-ms", "0.000001"], capture_output=True, timeout=120, check=False, cwd=ROOT)
    assert failing.returncode == 1
