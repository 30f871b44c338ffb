"""Ranks that share the machine, asked again and again for some seconds each: the rounds of a calibration.

Neighbours slow a shared machine for seconds at a time, now its caches and now its memory. So all settings are there at once, each
round asks every one of them everything, and of each answer what is undisturbed over the rounds counts (`utils/noise.py`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

import msgspec

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from lockstep.executor.affinity import plan_here
from lockstep.executor.contract import Executor
from lockstep.executor.factory import make_executor
from lockstep.kernels.threads import Seat
from lockstep.planner.calibration import Mode
from lockstep.planner.layout import Layout
from lockstep.planner.memory import weight_bytes
from lockstep.planner.model import from_spec
from lockstep.simulation import measure
from lockstep.simulation.engine_steps import Runs, with_steps
from lockstep.simulation.measure import CASES, LONGEST, MODELS, Answer, Speeds

TINY = measure.model(128, 384, 2, 4, 2, 32, 1024)
MOST_ROWS, MOST_TOKENS = 32, 2048  # of a step that is asked for
STEP_OPERATIONS_S = 0.2
SPEEDS_S = 0.2
# What one of several ranks that are at work takes over from all of them:
_OF_ALL = ("combine", "exchange", "step", "step_far", "far_bytes", "prompt_s", "prompt_token_s", "small_steps", "disturbed")
CASES_OF = (*((*CASES, LONGEST),) * 3, CASES, CASES)
SHARES = (0.1, 0.1, 0.1, 0.2, 0.5)  # of the time, for each of the models


@dataclass(frozen=True)
class Question:
    """How the models are laid over the ranks, and which ranks compute. usual: what counts is the mean, not what is undisturbed."""

    tp: int
    alone: bool
    only: int | None = None
    usual: bool = False


WHOLE, ONE = Question(1, True), Question(1, True, only=1)


@dataclass(frozen=True)
class Ranks:
    """So many ranks that share this machine's cores, to be asked."""

    count: int
    threads: int  # of each
    dtype: str
    executor: Executor
    seat: AbstractContextManager[None]  # what their caller sits on while they compute

    def ask(self, q: Question, spec: ModelSpec, cases: Sequence[measure.Case], seconds: float) -> Answer:
        """See `measure.ask`."""
        typed = replace(spec, dtype=self.dtype)
        with self.seat:
            return measure.ask(self.executor, typed, cases, seconds, tp=q.tp, alone=q.alone, only=q.only, usual=q.usual)

    def speeds(self, busy: int) -> Speeds:
        """Of each of `busy` ranks now, neighbours included: what `Mode` has of the calibration without them."""
        q = WHOLE if busy == self.count else ONE
        return measure.speeds(self.ask(replace(q, usual=True), MODELS[-1], (measure.READ, measure.MULTIPLY), SPEEDS_S))


@dataclass(frozen=True)
class Engines:
    """The whole engine, ready with a small model, which caches hold, and with a large one: each call measures it."""

    small: Callable[[], Runs]
    large: Callable[[], Runs]
    spec: ModelSpec  # of the small model
    large_spec: ModelSpec
    tokens: int  # of its answers


@dataclass
class Setting:
    """Ranks, the engine with as many, and what both said so far."""

    ranks: Ranks
    engines: Engines
    small: list[Runs] = field(default_factory=list)  # by rounds
    small_alone: list[Answer] = field(default_factory=list)  # the operations of those runs
    large: list[Runs] = field(default_factory=list)
    answers: dict[str, list[list[Answer]]] = field(default_factory=dict)  # by question: rounds of an answer for each model

    @property
    def questions(self) -> dict[str, Question]:
        """By name: what a round asks. `cut` shows what summing over the ranks costs, `one`, how fast a rank is when others wait."""
        cut = {"cut": Question(self.ranks.count, False), "one": ONE}
        return {"all": WHOLE, **(cut if self.ranks.count > 1 else {})}

    def round(self, seconds: float) -> None:
        """Ask everything but `small_round`'s once, for about so many seconds a question."""
        self.large.append(self.engines.large())
        for name, question in self.questions.items():
            asked = zip(MODELS, CASES_OF, SHARES, strict=True)
            said = [self.ranks.ask(question, model, cases, share * seconds) for model, cases, share in asked]
            self.answers.setdefault(name, []).append(said)

    def small_round(self) -> None:
        """Ask about the small model alone: its steps are over soonest, so that of them most are wanted."""
        runs, half = self.engines.small(), self.engines.tokens // 2
        cases = [(run.rows, 1, run.prompt + half) for run in runs] + [(run.rows, run.prompt, run.prompt) for run in runs]
        self.small.append(runs)
        self.small_alone.append(self.ranks.ask(Question(self.ranks.count, False), self.engines.spec, cases, STEP_OPERATIONS_S))

    def modes(self, cache_bytes: int) -> list[Mode]:
        """All ranks at work, and one of several."""
        models = {name: list(zip(*rounds, strict=True)) for name, rounds in self.answers.items()}
        alone = {name: [measure.joined(each) for each in answers] for name, answers in models.items()}
        whole = self._mode(alone["all"], self.ranks.count, cache_bytes)
        if "cut" in alone:
            whole = measure.with_collectives(whole, alone["cut"], cache_bytes)
        large = from_spec(replace(self.engines.large_spec, dtype=self.ranks.dtype), "large")
        whole = with_steps(whole, self.small, self.large, measure.joined(self.small_alone), weight_bytes(large, Layout()))
        whole = msgspec.structs.replace(whole, disturbed=mean(map(measure.disturbed, models["all"])))
        if "one" not in alone:
            return [whole]
        same = {name: getattr(whole, name) for name in _OF_ALL}
        return [whole, msgspec.structs.replace(self._mode(alone["one"], 1, cache_bytes), **same)]

    def _mode(self, answers: Sequence[Answer], busy: int, cache_bytes: int) -> Mode:
        return measure.mode_of(answers, ranks=self.ranks.count, busy=busy, threads=self.ranks.threads, cache_bytes=cache_bytes)


@contextmanager
def ranks_here(count: int, dtype: str) -> Iterator[Ranks]:
    """Ranks with a tiny model. A rank in this process computes on the cores that it has in the engine."""
    config = EngineConfig(
        model=ModelConfig(dtype=dtype, load_format="dummy", max_model_len=2048),  # type: ignore[arg-type]
        parallel=ParallelConfig(tensor_parallel_size=count),
        cache=CacheConfig(num_gpu_blocks_override=MOST_ROWS * 64, enable_prefix_caching=False),
        scheduler=SchedulerConfig(max_num_seqs=MOST_ROWS, max_num_batched_tokens=MOST_TOKENS),
        runtime=RuntimeConfig(device="cpu"),
    )
    share = plan_here(count, config.parallel)[0]
    with tempfile.TemporaryDirectory(prefix="lockstep-calibrate-") as folder:
        executor = make_executor(config, TINY, Path(folder))
        try:
            yield Ranks(count, share.threads, dtype, executor, Seat(share) if count == 1 else nullcontext())
        finally:
            executor.shutdown()
