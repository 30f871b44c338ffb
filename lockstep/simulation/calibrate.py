"""Measures this machine with the engine's own ranks: what `planner.cpu` needs to know the step of any model on it.

1. One rank on all cores, then two ranks that share them: models of four sizes, whole on their rank, every kind of operation.
   Two ranks also alone (the other one waits) and with the models cut over them, which shows what summing costs.
2. A small model through the whole engine, in both settings: what a step costs besides its operations.
What two ranks exchange (all-reduce, send and receive), and the steps of the whole engine, the caller measures and hands in.

Every model is asked three times, some time apart, since neighbours slow a shared machine for some seconds at a time; its longest steps
once, which no budget leaves out: a larger model's long prompts are priced by them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from lockstep.executor.affinity import plan_here
from lockstep.executor.contract import Executor
from lockstep.executor.factory import make_executor
from lockstep.kernels.threads import Seat
from lockstep.planner.calibration import Line, Mode
from lockstep.simulation import measure, rates_fit
from lockstep.simulation.measure import DECODE, LONG, MODELS, PREFILL, Answer

TINY = measure.model(128, 384, 2, 4, 2, 32, 1024)
MOST_ROWS, MOST_TOKENS = 32, 2048  # of a step that is asked for
STEP_OPERATIONS_S = 1.0
PASSES = 3
SHARES = (0.1, 0.15, 0.25, 0.5)  # of the time, for each of the models
Say = Callable[[str], None]
Bandwidth = Callable[[int], float]  # threads -> bytes/s of all together


@dataclass(frozen=True)
class Run:
    """`rows` prompts of `prompt` tokens at once through the whole engine: seconds to their first tokens, and of a step after them."""

    rows: int
    prompt: int
    first_s: float
    step_s: float


@dataclass(frozen=True)
class Steps:
    """Runs of a model, with answers of `tokens`."""

    spec: ModelSpec
    tokens: int
    runs: list[Run]


def machine_modes(
    seconds: float, bandwidth: Bandwidth, steps: Callable[[int], Steps], say: Say, cache_bytes: int, dtype: str = "bfloat16"
) -> list[Mode]:
    """The modes of one rank and of two, in about so many seconds. bandwidth: measures reading with so many threads. steps: runs a
    small model through the engine with so many ranks."""
    begun, found = time.monotonic(), []
    per_answer = 0.8 * seconds / 4
    for ranks in (1, 2):
        config = _config(ranks, dtype)
        threads = plan_here(ranks, config.parallel)[0].threads
        together = bandwidth(threads * ranks) / ranks
        say(f"{ranks} rank{'s' if ranks > 1 else ''}: whole steps of a small model ...")
        whole = steps(ranks)
        with _ranks(config) as executor:
            say(f"{ranks} rank{'s' if ranks > 1 else ''} of {threads} thread{'s' if threads > 1 else ''}: operations ...")
            mode = measure.mode_of(
                _answers(executor, per_answer, tp=1, alone=True),
                ranks=ranks,
                busy=ranks,
                threads=threads,
                bandwidth=together,
                cache_bytes=cache_bytes,
            )
            if ranks > 1:
                mode = measure.with_collectives(mode, _answers(executor, per_answer, tp=ranks, alone=False))
                lone = _answers(executor, per_answer, tp=1, alone=True, only=1)
            mode = with_steps(mode, executor, whole)
            found.append(mode)
        if ranks > 1:
            single = measure.mode_of(lone, ranks=ranks, busy=1, threads=threads, bandwidth=bandwidth(threads), cache_bytes=cache_bytes)
            found.append(msgspec.structs.replace(single, combine=mode.combine, exchange=mode.exchange, step=mode.step,
                                                 prompt_s=mode.prompt_s, prompt_token_s=mode.prompt_token_s))  # fmt: skip
    say(f"operations and steps took {time.monotonic() - begun:.0f} s")
    return found


def _answers(executor: Executor, seconds: float, *, tp: int, alone: bool, only: int | None = None) -> list[Answer]:
    short = tuple(case for case in PREFILL if case[0] * case[1] < LONG)
    passes = [
        [
            measure.ask(executor, spec, (*DECODE, *(short if turn else PREFILL)), share * seconds / PASSES, tp=tp, alone=alone, only=only)
            for spec, share in zip(MODELS, SHARES, strict=True)
        ]
        for turn in range(PASSES)
    ]
    return [measure.joined(answers) for answers in zip(*passes, strict=True)]


def _config(ranks: int, dtype: str) -> EngineConfig:
    blocks = MOST_ROWS * 64
    return EngineConfig(
        model=ModelConfig(dtype=dtype, load_format="dummy", max_model_len=2048),  # type: ignore[arg-type]
        parallel=ParallelConfig(tensor_parallel_size=ranks),
        cache=CacheConfig(num_gpu_blocks_override=blocks, enable_prefix_caching=False),
        scheduler=SchedulerConfig(max_num_seqs=MOST_ROWS, max_num_batched_tokens=MOST_TOKENS),
        runtime=RuntimeConfig(device="cpu"),
    )


@contextmanager
def _ranks(config: EngineConfig) -> Iterator[Executor]:
    """Ranks with the tiny model. A rank in this process computes on the cores that it has in the engine."""
    with tempfile.TemporaryDirectory(prefix="lockstep-calibrate-") as folder:
        executor = make_executor(config, TINY, Path(folder))
        try:
            with Seat(plan_here(1, config.parallel)[0]) if config.parallel.world_size == 1 else _nowhere():
                yield executor
        finally:
            executor.shutdown()


@contextmanager
def _nowhere() -> Iterator[None]:
    yield


def with_steps(mode: Mode, executor: Executor, measured: Steps) -> Mode:
    """The mode, and what a step of the whole engine costs beyond its operations: by requests, by prompts, and by tokens of prompts."""
    runs = measured.runs
    cases = [(run.rows, 1, run.prompt + measured.tokens // 2) for run in runs] + [(run.rows, run.prompt, run.prompt) for run in runs]
    answer = measure.joined([measure.ask(executor, measured.spec, cases, STEP_OPERATIONS_S, tp=mode.ranks, alone=False) for _ in range(2)])
    used = [measure.step_of(answer, times) for times in answer.times]
    steps = [(float(run.rows), run.step_s - s, run.step_s) for run, s in zip(runs, used, strict=False)]
    step = Line(*rates_fit.fit([(1.0, rows) for rows, _, _ in steps], [left for _, left, _ in steps], of=[whole for *_, whole in steps]))
    found = [(run, run.first_s - s - step.at(run.rows)) for run, s in zip(runs, used[len(runs) :], strict=True) if s > 0]
    features = [(float(run.rows), float(run.rows * (run.prompt - 1))) for run, _ in found]
    beyond, whole = [left for _, left in found], [run.first_s for run, _ in found]
    prompt_s, token_s = rates_fit.fit(features, beyond, of=whole) if found else (0.0, 0.0)
    return msgspec.structs.replace(mode, step=step, prompt_s=prompt_s, prompt_token_s=token_s)


def with_messages(mode: Mode, all_reduce: Sequence[tuple[int, float]], send_recv: Sequence[tuple[int, float]], itemsize: int) -> Mode:
    """The mode with what was measured of messages alone, (bytes, seconds): the pipeline's hop is as long as an exchange, in which
    both ranks send and receive; and a sum in place, found as a difference of two times, takes no less than an all-reduce."""
    hop = rates_fit.line((float(size), seconds) for size, seconds in send_recv)
    least = rates_fit.line((size / itemsize, seconds) for size, seconds in all_reduce)
    summed = Line(max(mode.combine.base_s, least.base_s), max(mode.combine.per_s, least.per_s)) if mode.ranks > 1 else mode.combine
    return msgspec.structs.replace(mode, hop=hop, combine=summed)
