"""An engine over a pipeline under a fake clock: stages that take time, tokens that go back to the first, planning that takes time."""

from __future__ import annotations

import pytest

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from lockstep.engine.core import EngineCore
from lockstep.engine.plan_builder import ScheduledStep
from lockstep.protocol import EngineRequest, SamplingParams, StepPlan
from lockstep.testing.fakes import FakeClock, FakeExecutor, FakeFuture

SPEC = ModelSpec("LlamaForCausalLM", 64, 4, 4, 2, 16, 128, 258, 512)
STAGE_S, PLAN_S = 1.0, 0.1


class Pipeline(FakeExecutor):
    """Each stage takes STAGE_S for a step, in order; the first waits for the tokens of its rows."""

    def __init__(self, clock: FakeClock, stages: int, depth: int) -> None:
        super().__init__(vocab_size=SPEC.vocab_size, max_concurrent_batches=depth, stages=stages)
        self.clock, self.free_s = clock, [0.0] * stages
        self.began_s: list[float] = []  # on the first stage
        self.handed_over_s: list[float] = []
        self.ends_s: list[float] = []
        self.tokens_s: dict[int, float] = {}  # by slot: when its last token leaves the last stage

    def execute_model(self, plan: StepPlan) -> FakeFuture:
        for new in plan.new:
            self.tokens_s.pop(new.slot, None)
        at_s = max([self.clock(), *(self.tokens_s.get(slot, 0.0) for slot in plan.slots)])
        self.handed_over_s.append(self.clock())
        for stage in range(self.stages):
            begins_s = max(self.free_s[stage], at_s)
            if not stage:
                self.began_s.append(begins_s)
            at_s = self.free_s[stage] = begins_s + STAGE_S
        self.ends_s.append(at_s)
        self.tokens_s.update({slot: at_s for slot, samples in zip(plan.slots, plan.samples, strict=True) if samples})
        return super().execute_model(plan)

    def wait(self, plan: StepPlan, timeout: float | None) -> None:
        left_s = max(0.0, self.ends_s[plan.step] - self.clock())
        self.clock.advance(left_s if timeout is None else min(left_s, timeout + 1e-9))
        if timeout is not None and timeout < left_s:
            raise TimeoutError


def engine(stages: int, depth: int, *, just_in_time: bool) -> tuple[EngineCore, Pipeline]:
    clock = FakeClock(0.0)
    config = EngineConfig(
        model=ModelConfig(max_model_len=256),
        parallel=ParallelConfig(pipeline_parallel_size=stages),
        cache=CacheConfig(num_gpu_blocks_override=400, enable_prefix_caching=False),
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=64),
    )
    core = EngineCore(config, SPEC, executor := Pipeline(clock, stages, depth), just_in_time=just_in_time, clock=clock)
    schedule = core.scheduler.schedule

    def plan() -> ScheduledStep | None:
        clock.advance(PLAN_S)
        return schedule()

    core.scheduler.schedule = plan  # type: ignore[method-assign]
    return core, executor


def ask(core: EngineCore, name: str, tokens: int = 60) -> None:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    core.add_request(EngineRequest(request_id=name, prompt_token_ids=[1, 2, 3], seed=0, sampling=sampling))


def run(core: EngineCore, executor: Pipeline, steps: int) -> None:
    while len(executor.began_s) < steps:
        core.step()


@pytest.mark.parametrize("just_in_time", [False, True], ids=["at once", "just in time"])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_full_pipeline_does_not_wait_for_its_engine(stages: int, just_in_time: bool) -> None:
    """With one step more in flight than stages; with one for each of them, planning is on every token's way."""
    turns = {}
    for depth in (stages, stages + 1):
        core, executor = engine(stages, depth, just_in_time=just_in_time)
        for i in range(2 * stages):
            ask(core, str(i))
        run(core, executor, 40 * stages)
        half = executor.began_s[20 * stages :]
        turns[depth] = (half[-1] - half[0]) / (len(half) - 1)
    assert turns[stages] >= STAGE_S + 0.9 * PLAN_S / stages
    assert turns[stages + 1] == pytest.approx(STAGE_S)


def test_just_in_time_the_step_more_is_handed_over_shortly_before_the_first_stage_is_free() -> None:
    core, executor = engine(2, 3, just_in_time=True)
    for i in range(4):
        ask(core, str(i))
    run(core, executor, 60)
    waits = [began - handed for began, handed in zip(executor.began_s[30:], executor.handed_over_s[30:], strict=True)]
    assert min(waits) > 0 and max(waits) < 0.3 * STAGE_S


@pytest.mark.parametrize("just_in_time", [False, True], ids=["at once", "just in time"])
def test_a_request_fills_an_idle_stage_at_once(just_in_time: bool) -> None:
    core, executor = engine(2, 3, just_in_time=just_in_time)
    ask(core, "alone", 200)
    run(core, executor, 60)
    before, asked_s = len(executor.plans), executor.clock()
    ask(core, "comes")
    core.step()
    (step,) = (plan for plan in executor.plans[before:] if plan.new)
    assert executor.handed_over_s[step.step] - asked_s < 3 * PLAN_S


def test_few_requests_take_turns_whatever_the_depth() -> None:
    """Fewer than stages: a request is planned once its token has come, and never waits on the first stage for it."""
    core, executor = engine(4, 5, just_in_time=True)
    ask(core, "0", 20)
    ask(core, "1", 20)
    while core.has_unfinished():
        core.step()
    assert all(began - handed < STAGE_S + 1e-6 for began, handed in zip(executor.began_s, executor.handed_over_s, strict=True))
