"""The engine: requests in, steps to the executor, outputs out."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from lockstep.config.defaults import default_token_budget
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.engine.admission import Limits, check_request
from lockstep.engine.plan_builder import ScheduledStep
from lockstep.engine.scheduler import Scheduler
from lockstep.engine.sizing import MemoryPlan, plan_memory
from lockstep.engine.stats import EngineReport, EngineStats
from lockstep.engine.step_meter import StepMeter
from lockstep.executor.contract import Executor, ExecutorError, StepFuture
from lockstep.observability.flight_recorder import FlightRecorder
from lockstep.protocol import EngineOutput, EngineRequest, StepResult

RESULT_GRACE_S = 10.0  # the executor times a step itself and knows why it is late: let it speak first
EARLY = 0.2  # so much of a step's expected time before its end the next one is issued: expectations are about so wrong
EARLY_S = 0.003  # and so much more: planning takes time, and handing the plan to the ranks


class EngineCore:
    """One engine over one executor. Not thread-safe: one thread calls it.

    Life: construct (sizes the KV cache, allocates it on every rank) -> add_request/abort/step -> shutdown.

    Failure of the executor: the `step` that meets it ends every unfinished request with one terminal output,
    finish_reason "error", and returns these. It does not raise. From then on `failure` is set, `has_unfinished` is
    False, and `step`, `add_request` and `check_health` raise that same ExecutorError. `abort` and `shutdown` never raise.

    `config` is the configuration with every None filled in; `memory` tells how the KV cache was sized.
    """

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        executor: Executor,
        *,
        just_in_time: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """just_in_time: for a caller that hears of requests while steps run, between its calls of `step`. The next step is then
        planned when the one that runs is about to end, not at once, so that a request need not wait for two. In a pipeline every
        stage has a step, and the next one is planned when the oldest is about to end.
        """
        self.memory, self.config = size_engine(config, spec, executor)
        self.executor = executor
        self.failure: ExecutorError | None = None
        executor.initialize_kv_cache(self.memory.num_blocks)
        self.scheduler = Scheduler(
            limits_of(self.config, spec, self.memory),
            prefix_caching=config.cache.enable_prefix_caching,
            hash_seed=config.model.seed,
            stages=config.parallel.pipeline_parallel_size,
            clock=clock,
        )
        ahead = config.scheduler.async_scheduling or config.parallel.pipeline_parallel_size > 1
        self.depth = executor.max_concurrent_batches if ahead else 1
        self._stages = config.parallel.pipeline_parallel_size
        self._just_in_time = just_in_time and self.depth > self._stages
        self._timeout_s = config.parallel.execute_model_timeout_seconds + RESULT_GRACE_S
        self._meter = StepMeter(clock)
        self._in_flight: deque[tuple[ScheduledStep, StepFuture, float]] = deque()  # oldest first, with when it was issued
        self.flight = FlightRecorder("engine")
        self.busy_since_s: float | None = None  # monotonic time at which the `step` (or sleep, wake_up) under way began
        self.moving_memory = False  # whether that gives memory back or takes it again: weights may be read, as in a start
        self.paused, self.sleep_level = False, 0

    def add_request(self, request: EngineRequest) -> None:
        """Queue a request. It will end in exactly one output with a finish_reason.

        Raises RequestError, and nothing is queued, when it can never run (the message has the broken number) or its id
        is in use; the ExecutorError after a failure.
        """
        self._raise_failure()
        self.scheduler.add(request)

    def check_request(self, request: EngineRequest) -> None:
        """Raise RequestError (which does not name the request) when it can never run; the ExecutorError after a failure."""
        self._raise_failure()
        check_request(request, self.scheduler.limits)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests: blocks are free at once, the next `step` returns their terminal outputs ("abort"). Unknown ids are ignored."""
        self.scheduler.abort(request_ids)

    def step(self) -> list[EngineOutput]:
        """Issue as many steps as may be in flight, then wait for the oldest one. Returns what came for requests.

        With `just_in_time` it may return before either, with nothing: hear of new requests, and call again.
        """
        if self.failure is not None and not self.scheduler.has_unfinished():
            raise self.failure
        self.busy_since_s = time.monotonic()
        try:
            self._advance()
        except ExecutorError as error:
            self._fail(error)
        except Exception as error:  # our own fault: it is raised, and the requests are told at the next step
            self._fail(ExecutorError(f"the engine failed: {error!r}", phase="engine", kind="raised", error_type=type(error).__name__))
            raise
        finally:
            self.busy_since_s = None
        return self.scheduler.take_outputs()

    def _advance(self) -> None:
        """Steps are issued before the oldest is waited for: the ranks run one while the next is planned."""
        if not self._just_in_time:
            self._issue(self.depth)
        elif self._in_flight:
            self._issue(self._stages)
            slack_s = self._slack_s()
            if slack_s <= 0:
                self._issue(self.depth)
            elif not self._ends_within(slack_s):
                return
        if self._in_flight:
            self._take_oldest()
        if self._just_in_time:
            self._issue(self._stages)  # does nothing but where ranks have nothing to do

    def _issue(self, depth: int) -> None:
        """Plan steps and hand them over, until `depth` are in flight."""
        timeline = self.executor.timeline
        while len(self._in_flight) < depth and not self.paused:
            with timeline.span("schedule", "engine"):
                planned = self.scheduler.schedule()
            if not planned:
                break
            issued_s = self._meter.now()
            self._in_flight.append((planned, self.executor.execute_model(planned.plan), issued_s))

    def _slack_s(self) -> float:
        """How long the next step need not be issued yet, while one runs; 0 or less when it must be, or that is not known."""
        step, _, issued_s = self._in_flight[0]
        return self._meter.left_s(step.plan, issued_s, EARLY) - EARLY_S

    def _ends_within(self, seconds: float) -> bool:
        """Wait for the oldest step for so long; whether it has ended."""
        step, future, _ = self._in_flight[0]
        with self.executor.timeline.span("wait for the ranks", "idle", step.plan.step), contextlib.suppress(TimeoutError):
            future.result(seconds)
            return True
        return False

    def _take_oldest(self) -> None:
        """Wait for the oldest step in flight, and take its result."""
        timeline = self.executor.timeline
        step, future, issued_s = self._in_flight.popleft()
        with timeline.span("wait for the ranks", "idle", step.plan.step):
            result = self._wait(step, future)
        self._meter.done(step.plan, issued_s)
        with timeline.span("update", "engine", step.plan.step):
            self.scheduler.update(step, result)
        plan = step.plan
        self.flight.step(plan.step, len(plan.slots), sum(plan.num_tokens), self._meter.now() - issued_s, result.compute_s)

    def _wait(self, step: ScheduledStep, future: StepFuture) -> StepResult:
        """The result of a step. Raises ExecutorError, also for a step that does not end in time."""
        started = time.monotonic()
        try:
            return future.result(self._timeout_s)
        except TimeoutError as error:
            number, waited = step.plan.step, time.monotonic() - started
            message = f"step {number} gave no result in {waited:.1f} s (execute_model_timeout_seconds, and {RESULT_GRACE_S:.0f} s): {error}"
            raise ExecutorError(message, phase=f"step {number}", kind="hung") from error

    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do: a request without its terminal output, or a step in flight. Requests of a paused
        engine are nothing to do."""
        return bool(self._in_flight) or (self.scheduler.has_outputs() if self.paused else self.scheduler.has_unfinished())

    # --- standing still ---

    def pause(self) -> None:
        """Plan no more steps; requests keep all they have, and new ones are taken and wait. Steps in flight end as usual."""
        self.paused = True
        self.flight.event("paused")

    def resume(self) -> None:
        """Go on. Raises ValueError while it sleeps."""
        if self.sleep_level:
            raise ValueError(f"the engine sleeps (level {self.sleep_level}): wake it up instead.")
        self.paused = False
        self.flight.event("resumed")

    def sleep(self, level: int) -> None:
        """Pause, and give memory back: the KV cache (level 1), and the weights as well (level 2).

        Requests wait, and go on after `wake_up` with the tokens that would have come: what was cached is computed again.
        Raises ValueError for another level, or when it sleeps at another; the ExecutorError when a rank fails in it.
        """
        if level not in (1, 2):
            raise ValueError(f"level={level} does not exist: 1 gives the KV cache's memory back, 2 the weights' too.")
        if self.sleep_level not in (0, level):
            raise ValueError(f"the engine sleeps already (level {self.sleep_level}): wake it up first.")
        if self.sleep_level == level:
            return
        self.paused = True
        with self._at_work():
            while self._in_flight:
                self._take_oldest()
            self.scheduler.preempt_all()
            self.scheduler.kv.pool.clear_cache()
            self.executor.collective_rpc("sleep", (level,))
        self.sleep_level = level
        self.flight.event("asleep", level=level)

    def wake_up(self) -> None:
        """Take the memory again, and go on. Nothing happens when it does not sleep."""
        if self.sleep_level:
            with self._at_work():
                self.executor.collective_rpc("wake_up")
            self.sleep_level, self.paused = 0, False
            self.flight.event("awake")

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix. Running requests keep their blocks."""
        self.scheduler.kv.pool.clear_cache()

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """A rank that fails inside fails the engine, as in a step: no engine is left half asleep."""
        self._raise_failure()
        self.busy_since_s, self.moving_memory = time.monotonic(), True
        try:
            yield
        except ExecutorError as error:
            self._fail(error)
            raise
        finally:
            self.busy_since_s, self.moving_memory = None, False

    def check_health(self) -> None:
        """Raise the ExecutorError if the engine can no longer run."""
        self._raise_failure()
        self.executor.check_health()

    def stats(self) -> EngineStats:
        """The numbers of this moment."""
        return self.scheduler.stats()

    def report(self) -> EngineReport:
        """The numbers of this moment, the steps' and the ranks' too. No rank is asked."""
        return EngineReport(self.stats(), self._meter.totals.copy(), self.executor.live())

    def shutdown(self) -> None:
        """Abort what is unfinished, and stop the executor. Never raises, may be called twice.

        The terminal outputs of what was aborted are returned by one more `step`; after that `step` raises ExecutorError.
        """
        if self.failure is None:
            self._in_flight.clear()
            self.scheduler.abort_all()
            self.failure = ExecutorError("the engine has been shut down: make a new one.", kind="shutdown")
        self.executor.shutdown()

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _fail(self, error: ExecutorError) -> None:
        self.failure = error
        self.flight.event("failed", kind=error.kind, rank=error.rank, phase=error.phase)
        self._in_flight.clear()
        self.scheduler.fail_all(str(error))


def size_engine(config: EngineConfig, spec: ModelSpec, executor: Executor) -> tuple[MemoryPlan, EngineConfig]:
    """How the KV cache is sized, and the configuration with every None filled. Raises ConfigError when nothing fits."""
    model_len = config.model.max_model_len or spec.max_position_embeddings
    config = replace(config, model=replace(config.model, max_model_len=model_len))
    budget = config.scheduler.max_num_batched_tokens or default_token_budget(config, spec)
    config = replace(config, scheduler=replace(config.scheduler, max_num_batched_tokens=budget))
    memory = plan_memory(config, spec, executor.memory())
    return memory, replace(
        config,
        scheduler=replace(config.scheduler, max_num_seqs=memory.max_num_seqs),
        cache=replace(config.cache, num_gpu_blocks_override=memory.num_blocks),
    )


def limits_of(config: EngineConfig, spec: ModelSpec, memory: MemoryPlan) -> Limits:
    """The scheduler's numbers, from a configuration without Nones."""
    scheduler = config.scheduler
    assert scheduler.max_num_seqs and scheduler.max_num_batched_tokens and config.model.max_model_len
    return Limits(
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_model_len=config.model.max_model_len,
        vocab_size=spec.vocab_size,
        num_blocks=memory.num_blocks,
        block_size=config.cache.block_size,
        chunked_prefill=scheduler.enable_chunked_prefill,
        by_priority=scheduler.scheduling_policy == "priority",
    )
