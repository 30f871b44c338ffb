"""Making executors around the fake worker, and looking at what they leave behind."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from lockstep.executor.contract import Executor
from lockstep.executor.factory import make_executor
from lockstep.protocol import StepPlan

FAKE_WORKER = "lockstep.testing.fake_worker:FakeWorker"
SPEC = ModelSpec("FakeForCausalLM", 64, 2, 4, 2, 16, 128, 512, 1024)


def fake_config(
    tp: int = 2, *, backend: str | None = None, step_s: float = 60.0, startup_s: float = 60.0, log_level: Any = "warning", **parallel: Any
) -> EngineConfig:
    """A configuration for fake workers: no device, no folder. `step_s`, `startup_s`: the limits."""
    return EngineConfig(
        parallel=dataclasses.replace(
            ParallelConfig(),
            tensor_parallel_size=tp,
            distributed_executor_backend=backend,
            execute_model_timeout_seconds=step_s,
            **parallel,
        ),
        scheduler=SchedulerConfig(),
        runtime=RuntimeConfig(device="cpu", startup_timeout_seconds=startup_s, log_level=log_level),
    )


@contextmanager
def fake_executor(tp: int = 2, *, again: bool = False, **settings: Any) -> Iterator[Executor]:
    """An executor around fake workers, shut down at the end. again: nodes are told that another one follows should it fail."""
    executor = make_executor(fake_config(tp, **settings), SPEC, Path("."), worker_cls=FAKE_WORKER, again=again)
    try:
        yield executor
    finally:
        executor.shutdown()


def decode_plan(step: int) -> StepPlan:
    """Two requests, one token each."""
    return StepPlan(step, [0, 3], [5, 6], [1, 1], [True, True])


def prefill_plan(step: int) -> StepPlan:
    """Two requests, several tokens of one."""
    return StepPlan(step, [0, 3], [0, 6], [4, 1], [True, True])


def children_of(pid: int) -> list[int]:
    """Pids of all processes below `pid`, by /proc."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(name))
    found, todo = [], [pid]
    while todo:
        below = parents.get(todo.pop(), [])
        found += below
        todo += below
    return found


def wait_for(condition: Any, timeout_s: float = 20.0) -> bool:
    """Whether `condition()` became true in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return bool(condition())
