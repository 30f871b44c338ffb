"""Measures this machine with the engine's own ranks: what `planner.cpu` needs to know the step of any model on it.

1. One rank on all cores, then two ranks that share them: models of four sizes, whole on their rank, every kind of operation.
   Two ranks also alone (the other one waits) and with the models cut over them, which shows what summing costs.
2. A tiny model through the whole engine, in both settings: what a step costs besides its operations.
What two ranks exchange (all-reduce, send and receive) the caller measures, and hands in.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

import msgspec

from lockstep.config.tree import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from lockstep.engine.core import EngineCore
from lockstep.executor.affinity import plan_here
from lockstep.executor.contract import Executor
from lockstep.executor.factory import make_executor
from lockstep.kernels.threads import Seat
from lockstep.planner.calibration import Calibration, Mode
from lockstep.planner.cpu import CpuModel
from lockstep.planner.layout import Layout
from lockstep.planner.model import from_spec
from lockstep.protocol import EngineRequest, SamplingParams
from lockstep.simulation import measure, rates_fit
from lockstep.simulation.measure import DECODE, MODELS, PREFILL, Answer

TINY = measure.model(128, 384, 2, 4, 2, 32, 1024)
ROWS = (1, 4, 16, 32)  # requests in the steps of the tiny model
PROMPT, STEPS = 256, 40
Say = Callable[[str], None]
Bandwidth = Callable[[int], float]  # threads -> bytes/s of all together


def machine_modes(seconds: float, bandwidth: Bandwidth, say: Say, dtype: str = "bfloat16") -> list[Mode]:
    """The modes of one rank and of two, in about so many seconds. bandwidth: measures reading with so many threads."""
    begun, found = time.monotonic(), []
    per_answer = 0.8 * seconds / (4 * len(MODELS))
    for ranks in (1, 2):
        config = _config(ranks, dtype)
        threads = plan_here(ranks, config.parallel)[0].threads
        together = bandwidth(threads * ranks) / ranks
        with _ranks(config) as executor:
            say(f"{ranks} rank{'s' if ranks > 1 else ''} of {threads} thread{'s' if threads > 1 else ''}: operations ...")
            mode = measure.mode_of(
                _answers(executor, per_answer, tp=1, alone=True), ranks=ranks, busy=ranks, threads=threads, bandwidth=together
            )
            if ranks > 1:
                mode = measure.with_collectives(mode, _answers(executor, per_answer, tp=ranks, alone=False))
                lone = _answers(executor, per_answer, tp=1, alone=True, only=1)
            say(f"{ranks} rank{'s' if ranks > 1 else ''}: whole steps of a small model ...")
            mode = with_steps(mode, executor, config)
            found.append(mode)
        if ranks > 1:
            single = measure.mode_of(lone, ranks=ranks, busy=1, threads=threads, bandwidth=bandwidth(threads))
            found.append(msgspec.structs.replace(single, combine=mode.combine, exchange=mode.exchange, step=mode.step,
                                                 prompt_token_s=mode.prompt_token_s))  # fmt: skip
    say(f"operations and steps took {time.monotonic() - begun:.0f} s")
    return found


def _answers(executor: Executor, seconds: float, *, tp: int, alone: bool, only: int | None = None) -> list[Answer]:
    return [measure.ask(executor, spec, (*DECODE, *PREFILL), seconds, tp=tp, alone=alone, only=only) for spec in MODELS]


def _config(ranks: int, dtype: str) -> EngineConfig:
    blocks = max(ROWS) * (PROMPT + 4 * STEPS) // 16
    return EngineConfig(
        model=ModelConfig(dtype=dtype, load_format="dummy", max_model_len=2048),  # type: ignore[arg-type]
        parallel=ParallelConfig(tensor_parallel_size=ranks),
        cache=CacheConfig(num_gpu_blocks_override=blocks, enable_prefix_caching=False),
        scheduler=SchedulerConfig(max_num_seqs=max(ROWS), max_num_batched_tokens=2048),
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


def with_steps(mode: Mode, executor: Executor, config: EngineConfig) -> Mode:
    """The mode, and what a step of the engine costs beyond its operations: by requests, and by tokens of prompts."""
    core = EngineCore(config, TINY, executor)
    layout = Layout(tp=config.parallel.tensor_parallel_size)
    plain = CpuModel(_only(mode), from_spec(TINY, "tiny"), layout)
    prompts, decodes = [], []
    for rows in ROWS:
        prompt_s, step_s = _generate(core, rows)
        used = sum(plain.stage_s([1] * rows, [PROMPT + STEPS // 2] * rows, rows))
        decodes.append((float(rows), max(step_s - used, 1e-6)))
        prompts.append((rows, prompt_s))
    step = rates_fit.line(decodes)
    plain = CpuModel(_only(msgspec.structs.replace(mode, step=step)), plain.shape, layout)
    beyond = []
    for rows, prompt_s in prompts:
        if rows * PROMPT <= 2048:
            used = sum(plain.stage_s([PROMPT] * rows, [PROMPT] * rows, rows))
            beyond.append(max(prompt_s - used, 0.0) / (rows * (PROMPT - 1)))
    return msgspec.structs.replace(mode, step=step, prompt_token_s=median(beyond))


def _only(mode: Mode) -> Calibration:
    """A machine of which no more than this mode is known."""
    return Calibration(
        name="this", machine="", cores=1, kernels="", dtype="bfloat16", capacity_bytes=0, memory_bandwidth=mode.bandwidth,
        cache_bytes=1 << 62, flops={"bfloat16": 1.0}, all_reduce=[], send_recv=[], modes=[mode],
    )  # fmt: skip


def _generate(core: EngineCore, rows: int) -> tuple[float, float]:
    """(seconds to the first tokens of `rows` prompts at once, median seconds of a step after them)."""
    for i in range(rows):
        params = SamplingParams(max_tokens=STEPS, ignore_eos=True, temperature=0.0)
        prompt = [(7 * i + j) % TINY.vocab_size for j in range(PROMPT)]
        core.add_request(EngineRequest(request_id=f"{rows}-{i}", prompt_token_ids=prompt, sampling=params, seed=i))
    began, first, stamps = time.perf_counter(), 0.0, []
    while core.has_unfinished():
        came = core.step()
        now = time.perf_counter()
        if len(came) == rows:
            first = first or now - began
            stamps.append(now)
    return first, median(b - a for a, b in pairwise(stamps))


def hops(mode: Mode, send_recv: Sequence[tuple[int, float]]) -> Mode:
    """The mode with the pipeline's hop: as long as an exchange, in which both ranks send and receive."""
    return msgspec.structs.replace(mode, hop=rates_fit.line((float(size), seconds) for size, seconds in send_recv)) if send_recv else mode
