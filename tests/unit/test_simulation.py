"""The event simulator: by hand, against theory, and against the engine itself under a fake clock."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lockstep.cluster import balance
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from lockstep.engine.admission import Limits
from lockstep.engine.core import EngineCore, limits_of
from lockstep.engine.scheduler import Scheduler
from lockstep.protocol import StepPlan
from lockstep.simulation.arrivals import Arrival, as_request, at_once, poisson, trace
from lockstep.simulation.cost import FunctionCost, StepWork
from lockstep.simulation.report import Report, quantile
from lockstep.simulation.simulate import in_turn, simulate
from lockstep.testing.fakes import FakeClock, FakeExecutor, FakeFuture

SPEC = ModelSpec("LlamaForCausalLM", 64, 4, 4, 2, 16, 128, 1000, 512)


def run(arrivals: list[Arrival], cost: FunctionCost, *, seqs: int = 8, budget: int = 64, blocks: int = 64, **options) -> Report:
    limits = Limits(seqs, budget, 512, SPEC.vocab_size, blocks, 16)
    return simulate(lambda clock: Scheduler(limits, prefix_caching=False, stages=cost.stages, clock=clock), cost, arrivals, **options)


def second(work: StepWork) -> float:
    return 1.0


def test_one_request_by_hand():
    report = run([Arrival(0.5, 4, 3)], FunctionCost(second, driver=0.25))
    (served,) = report.requests
    assert served.token_s == [1.75, 3.0, 4.25], "each step: 0.25 s of the driver, 1 s of the ranks"
    assert (served.ttft_s, served.tpot_s, served.end_to_end_s, report.end_s) == (1.25, 1.25, 3.75, 4.25)
    assert report.throughput == 3 / 4.25 and report.replicas[0].steps == 3
    assert report.stage_usage() == [3 / 4.25]


def test_a_step_costs_what_its_work_is():
    seen = []
    run([Arrival(0, 100, 2), Arrival(0, 20, 2)], FunctionCost(lambda work: float(seen.append(work) is None)), budget=64)
    assert seen[0] == StepWork((64,), (64,), 0), "the prompt's first chunk takes the whole budget"
    assert seen[1] == StepWork((36, 20), (100, 20), 2) and seen[1].tokens == 56
    assert seen[2] == StepWork((1, 1), (101, 21), 2)


def test_a_second_request_waits_for_the_only_slot():
    report = run(at_once(2, 4, 2), FunctionCost(second), seqs=1)
    assert [r.token_s for r in report.requests] == [[1.0, 2.0], [3.0, 4.0]]
    assert report.waiting() == pytest.approx(0.5), "one of two waits for half of the time"


def test_a_pipeline_by_hand():
    alone = run(at_once(1, 4, 3), FunctionCost(lambda w: 2.0, stages=2, hop=0.5), depth=2)
    assert alone.requests[0].token_s == [2.5, 5.0, 7.5], "two stages of 1 s and a hop, one after the other"
    full = run(at_once(2, 4, 3), FunctionCost(lambda w: 2.0, stages=2), depth=2)
    assert [r.token_s for r in full.requests] == [[2.0, 4.0, 6.0], [3.0, 5.0, 7.0]]


@pytest.mark.parametrize(("stages", "requests"), [(2, 1), (4, 1), (4, 2), (4, 4), (3, 3)])
def test_decode_keeps_stages_busy_for_min_1_m_over_p(stages: int, requests: int):
    report = run(at_once(requests, 4, 400), FunctionCost(lambda w: float(stages), stages=stages), depth=stages, blocks=200)
    assert report.stage_usage() == pytest.approx([min(1, requests / stages)] * stages, rel=0.01)


def test_the_queue_is_that_of_theory():
    """M/D/1: one server of 1 s, half loaded: requests wait load * service / (2 (1 - load)) = 0.5 s."""
    report = run(poisson(0.5, 6000, 4, 1, seed=3), FunctionCost(second), seqs=1)
    waits = [r.ttft_s - 1 for r in report.requests]
    assert math.fsum(waits) / len(waits) == pytest.approx(0.5, rel=0.08)


def test_it_is_the_same_every_time():
    def once() -> list[list[float]]:
        cost = FunctionCost(lambda w: 0.01 + 0.001 * w.tokens)
        return [r.token_s for r in run(poisson(20, 60, 30, 10, spread=0.5, seed=5), cost, replicas=2, depth=2).requests]

    assert once() == once()


def test_routers_of_the_cluster_read_its_replicas():
    arrivals = [Arrival(0, 400, 50), *at_once(4, 4, 2)]
    shortest = run(arrivals, FunctionCost(second), replicas=2, router=lambda views, n: balance.shortest_queue(views, start=n))
    assert [r.replica for r in shortest.requests] == [0, 1, 1, 1, 1], "the long prompt keeps others away"
    assert [r.replica for r in run(arrivals, FunctionCost(second), replicas=2, router=in_turn).requests] == [0, 1, 0, 1, 0]


def test_clients_that_ask_again_keep_their_number():
    report = run(at_once(6, 4, 2), FunctionCost(second), concurrency=2)
    assert [r.arrival_s for r in report.requests] == [0, 0, 2, 2, 4, 4] and report.end_s == 6


def test_what_can_never_run_is_refused_with_the_reason():
    report = run([Arrival(0, 600, 2), Arrival(0, 4, 1)], FunctionCost(second))
    assert "max_model_len=512" in report.requests[0].refused and report.served == [report.requests[1]]
    assert "1 refused" in report.describe()


def test_a_cache_that_is_too_small_preempts():
    report = run(at_once(3, 30, 60), FunctionCost(second), blocks=12)
    assert sum(r.preemptions for r in report.requests) > 0
    assert report.kv_usage() > 0.5 and report.replicas[0].kv_usage.most == 1.0
    assert [len(r.token_s) for r in report.requests] == [60, 60, 60]


def test_traces_are_read_and_refused(tmp_path: Path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 12.5, "input_length": 7, "output_length": 3}\n\n{"timestamp": 10, "input_length": 5, "output_length": 2}\n'
    )
    assert trace(path) == [Arrival(0.0, 5, 2), Arrival(2.5, 7, 3)]
    for text, words in (
        ("{}", "line 1 of trace.* has no 'timestamp'"),
        ("[1", "does not fit"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1}', "at least 1"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            trace(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        trace(tmp_path / "none")
    with pytest.raises(ConfigError, match="rate=0"):
        poisson(0, 1, 1, 1)


def test_prompts_share_no_prefix():
    prompts = [tuple(as_request(i, Arrival(0, 8, 1), 10).prompt_token_ids) for i in range(500)]
    assert len(set(prompts)) == 500 and all(len(p) == 8 for p in prompts)


def test_quantiles_are_nearest_ranks():
    values = [4.0, 1.0, 3.0, 2.0]
    assert [quantile(values, share) for share in (0.25, 0.5, 0.75, 1.0)] == [1, 2, 3, 4] and quantile([], 0.5) == 0


class TimedExecutor(FakeExecutor):
    """A fake whose steps take the clock's time, stage after stage, as `cost` says."""

    def __init__(self, clock: FakeClock, cost: FunctionCost, depth: int) -> None:
        super().__init__(vocab_size=SPEC.vocab_size, max_concurrent_batches=depth, stages=cost.stages)
        self.clock, self.cost, self.free_s, self.done_s = clock, cost, [0.0] * cost.stages, {}
        self.left_early = 0  # waits that were over before their step

    def execute_model(self, plan: StepPlan) -> FakeFuture:
        work, at_s = StepWork.of(plan), self.clock()
        for stage, seconds in enumerate(self.cost.stage_s(work)):
            begin_s = max(self.free_s[stage], at_s + (self.cost.hop if stage else 0))
            at_s = self.free_s[stage] = begin_s + seconds
        self.done_s[plan.step] = at_s
        return super().execute_model(plan)

    def wait(self, plan: StepPlan, timeout: float | None) -> None:
        left_s = max(0.0, self.done_s[plan.step] - self.clock())
        self.clock.advance(left_s if timeout is None else min(left_s, timeout + 1e-9))
        if timeout is not None and timeout < left_s:
            self.left_early += 1
            raise TimeoutError


def engine_and_simulation(
    arrivals: list[Arrival], cost: FunctionCost, depth: int, *, simulated_depth: int, blocks: int = 400, just_in_time: bool
) -> tuple[list[list[float]], Report, EngineCore]:
    """When the engine gives each request's tokens, its executor under a fake clock, and what the simulation says of the same."""
    clock = FakeClock(0.0)
    config = EngineConfig(
        model=ModelConfig(max_model_len=256, dtype="float32"),
        parallel=ParallelConfig(pipeline_parallel_size=cost.stages),
        cache=CacheConfig(num_gpu_blocks_override=blocks, enable_prefix_caching=False),
        scheduler=SchedulerConfig(max_num_seqs=6, max_num_batched_tokens=64, async_scheduling=depth > 1),
    )
    core = EngineCore(config, SPEC, TimedExecutor(clock, cost, depth), just_in_time=just_in_time, clock=clock)
    times: dict[str, list[float]] = {}
    told = 0
    while told < len(arrivals) or core.has_unfinished():
        if not core.has_unfinished():
            clock.advance(max(0.0, arrivals[told].at_s - clock()))
        while told < len(arrivals) and arrivals[told].at_s <= clock():
            core.add_request(as_request(told, arrivals[told], SPEC.vocab_size))
            told += 1
        for output in core.step():
            times.setdefault(output.request_id, []).extend([clock()] * len(output.new_token_ids))
    limits = limits_of(core.config, SPEC, core.memory)
    report = simulate(lambda c: Scheduler(limits, prefix_caching=False, stages=cost.stages, clock=c), cost, arrivals, depth=simulated_depth)
    return [times[str(i)] for i in range(len(arrivals))], report, core


def linear(work: StepWork) -> float:
    return 0.5 + 0.125 * work.tokens + sum(work.contexts) / 1024


@pytest.mark.parametrize("just_in_time", [False, True], ids=["at once", "just in time"])
@pytest.mark.parametrize(("stages", "depth"), [(1, 1), (1, 2), (2, 2), (3, 3)])
@pytest.mark.parametrize("blocks", [400, 22], ids=["roomy", "preempting"])
def test_the_engine_under_a_fake_clock_agrees(stages: int, depth: int, just_in_time: bool, blocks: int):
    """The same requests at the same times: every token of every request at the same moment, of a served replica's engine too."""
    cost = FunctionCost(linear, stages=stages, hop=0.25 if stages > 1 else 0.0)
    arrivals = [Arrival(0.0, 40 + 7 * i, 20 + 3 * i) for i in range(9)]
    times, report, core = engine_and_simulation(arrivals, cost, depth, simulated_depth=depth, blocks=blocks, just_in_time=just_in_time)
    assert [r.token_s for r in report.requests] == [pytest.approx(each) for each in times]
    assert (core.stats().preemptions > 0) == (blocks == 22)
    assert report.replicas[0].steps == core.stats().steps
    assert isinstance(core.executor, TimedExecutor)
    assert (core.executor.left_early > 0) == (just_in_time and depth > stages), "there is a step more than stages to hold back"


@pytest.mark.parametrize("rate", [0.03, 0.1])
def test_a_served_replica_is_simulated_with_one_step_in_flight(rate: float):
    """It plans a step when the one before it is about to end: who comes by then is in it, as in the simulation."""
    arrivals = poisson(rate, 200, 30, 12, spread=0.5, seed=5)
    first, each = {}, {}
    for depth in (1, 2):
        times, report, _ = engine_and_simulation(arrivals, FunctionCost(linear), 2, simulated_depth=depth, just_in_time=True)
        told = [t[0] - arrival.at_s for t, arrival in zip(times, arrivals, strict=True)]
        beyond = [t[-1] - t[0] for t in times]
        first[depth] = math.fsum(told) / math.fsum(r.ttft_s for r in report.requests) - 1
        each[depth] = math.fsum(beyond) / math.fsum(r.token_s[-1] - r.token_s[0] for r in report.requests) - 1
    assert 0 < first[1] < 0.03 and abs(each[1]) < 0.02
    assert first[2] < -0.03, "were the next step planned at once, a request would wait for two"
