"""Killing ranks of a real engine's worker, with a model loaded and inside real collectives."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from pathlib import Path

import pytest

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig, ModelConfig, ParallelConfig, RuntimeConfig
from lockstep.config.validate import resolve
from lockstep.executor.contract import Executor, ExecutorError
from lockstep.executor.factory import make_executor
from lockstep.protocol import NewRequest, SamplingParams, StepPlan
from lockstep.testing.executors import children_of, wait_for
from lockstep.utils import procs

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]
SAMPLE = (("rendezvous", 1, "kill"), ("load", 0, "raise"), ("prefill", 1, "raise"), ("decode", 0, "stop"), ("decode", 1, "kill"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> tuple[EngineConfig, ModelSpec, Path]:
    from lockstep.testing.tiny import make_tiny

    folder = make_tiny("llama", tmp_path_factory.mktemp("tiny"))
    return resolve(
        EngineConfig(
            model=ModelConfig(model=str(folder), dtype="float32", max_model_len=64),
            parallel=ParallelConfig(tensor_parallel_size=2, threads_per_rank=1),
            runtime=RuntimeConfig(device="cpu", startup_timeout_seconds=120),
        )
    )


def start(settings: tuple[EngineConfig, ModelSpec, Path]) -> Executor:
    executor = make_executor(*settings)
    executor.initialize_kv_cache(16)
    return executor


def plan(step: int, freed: bool = False) -> StepPlan:
    """One request: 4 tokens of prompt, then one token a step. `freed`: the slot's former request is given back first."""
    if step == 0:
        new = NewRequest(0, "r", [5, 6, 7, 8], 4, [0, 1, 2, 3], SamplingParams(temperature=0.0), 0)
        return StepPlan(0, [0], [0], [4], [True], new=[new], freed=[0] if freed else [])
    return StepPlan(step, [0], [3 + step], [1], [True])


def generate(executor: Executor, steps: int, freed: bool = False) -> list[int]:
    return [executor.execute_model(plan(step, freed)).result(60).tokens[0] for step in range(steps)]


def worker_pids() -> dict[int, int]:
    """Pids of this process's workers, by rank."""
    found = {}
    for pid in children_of(os.getpid()):
        line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"lockstep.executor.worker_main" in line:
            found[int(line[-2].removeprefix(b"rank="))] = pid
    return found


def test_a_kill_in_the_middle_of_steps_is_blamed_on_the_killed(settings: tuple[EngineConfig, ModelSpec, Path]) -> None:
    """Two steps are always in flight; a rank is killed inside one. Its peer's collective breaks, or never returns."""
    executor = start(settings)
    tokens = generate(executor, 30)
    assert generate(executor, 30, freed=True) == tokens
    pids = worker_pids()
    killer = threading.Timer(0.1, os.kill, (pids[1], signal.SIGKILL))
    killer.start()
    futures = []
    with pytest.raises(ExecutorError) as caught:
        for i in range(100_000):
            futures.append(executor.execute_model(plan(i % 30, freed=True)))
            if len(futures) == executor.max_concurrent_batches:
                futures.pop(0).result(60)
    assert (caught.value.kind, caught.value.rank, caught.value.exitcode) == ("died", 1, -signal.SIGKILL)
    assert caught.value.phase.startswith("step") or caught.value.phase == "idle"
    assert procs.wait_gone(pids.values(), 5) == []
    executor.shutdown()


MATRIX = [
    pytest.param(phase, rank, action, marks=() if (phase, rank, action) in SAMPLE else pytest.mark.full)
    for phase in ("rendezvous", "init", "load", "prefill", "decode")
    for rank in (0, 1)
    for action in ("kill", "stop", "raise")
]


@pytest.mark.parametrize(("phase", "rank", "action"), MATRIX)
def test_faults_in_every_phase_are_named(
    settings: tuple[EngineConfig, ModelSpec, Path], monkeypatch: pytest.MonkeyPatch, phase: str, rank: int, action: str
) -> None:
    monkeypatch.setenv("LOCKSTEP_FAULT", f"{phase}:{rank}:{action}")
    with pytest.raises(ExecutorError) as caught:
        generate(start(settings), 3)
    error = caught.value
    assert (error.kind, error.rank) == ({"kill": "died", "stop": "stopped", "raise": "raised"}[action], rank), error
    assert error.phase == {"prefill": "step 0", "decode": "step 1"}.get(phase, phase)
    assert wait_for(lambda: not worker_pids(), 5)


def test_a_hang_inside_a_real_step_says_which_collective(
    settings: tuple[EngineConfig, ModelSpec, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, spec, folder = settings
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, execute_model_timeout_seconds=2.0))
    monkeypatch.setenv("LOCKSTEP_FAULT", "decode:1:sleep=100")
    with pytest.raises(ExecutorError, match="step 1 made no progress") as caught:
        generate(start((config, spec, folder)), 3)
    error = caught.value
    assert (error.kind, error.rank) == ("hung", 1)
    assert "rank 0 at step 1 collective 1 (tp:0.layers)" in str(error) and "rank 1 at step 1 collective 0" in str(error)
    assert any("kernels/program.py" in line for line in error.log_tail), "the stack of the rank that waits"
    assert any("strike" in line for line in error.log_tail), "the stack of the rank that is stuck"
