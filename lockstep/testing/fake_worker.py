"""A worker without a model or torch, for tests of executors: starts in a moment, and can be told to misbehave."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.distributed.progress import ProgressCell
from lockstep.executor.contract import RankMemory
from lockstep.observability.logging import get_logger
from lockstep.observability.timeline import Recorded
from lockstep.protocol import StepPlan, StepResult
from lockstep.utils.cores import RankCores


class FakeWorker(Recorded):
    """Answers what it is asked. Its tokens are `step * 1000 + slot`."""

    needs_distributed = False

    def __init__(
        self, config: EngineConfig, spec: ModelSpec, folder: Path, rank: int, local_rank: int, groups: Any, progress: ProgressCell | None
    ) -> None:
        super().__init__()
        self.rank, self.progress = rank, progress
        parallel = config.parallel
        self.reports = rank == parallel.world_size - parallel.stage_size
        self.num_blocks = 0
        self.steps: list[int] = []
        self.step_fault = ""

    def init_device(self, share: RankCores | None = None, own_process: bool = False) -> None:
        pass

    def load_model(self) -> None:
        pass

    def memory(self) -> RankMemory:
        return RankMemory(
            rank=self.rank, weight_bytes=1000 + self.rank, free_bytes=1 << 20, kv_bytes_per_block=64, kv_bytes=64 * self.num_blocks
        )

    def initialize_kv_cache(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks

    def execute_model(self, plan: StepPlan) -> StepResult | None:
        self.steps.append(plan.step)
        if self.step_fault:
            self.misbehave(self.step_fault)
        if not self.reports:
            return None
        return StepResult(step=plan.step, tokens=[plan.step * 1000 + s for s, yes in zip(plan.slots, plan.samples, strict=True) if yes])

    # -- for tests

    def arm(self, rank: int, fault: str) -> None:
        """From now on, steps on `rank` misbehave."""
        if rank == self.rank:
            self.step_fault = fault

    def misbehave(self, fault: str) -> str:
        """raise:MESSAGE, sleep:SECONDS, spin:SECONDS, collectives:COUNT (entering one every 50 ms), exit:CODE."""
        action, _, value = fault.partition(":")
        if action == "raise":
            raise KeyError(value)
        if action == "sleep":
            time.sleep(float(value))
        elif action == "spin":
            end = time.perf_counter() + float(value)
            while time.perf_counter() < end:
                pass
        elif action == "collectives":
            for _ in range(int(value)):
                time.sleep(0.05)
                if self.progress is not None:
                    self.progress.enter_collective("fake.all_reduce")
        elif action == "exit":
            print("last words", file=sys.stderr)
            os._exit(int(value))
        else:
            raise ValueError(fault)
        return action

    def misbehave_on(self, rank: int, fault: str) -> str:
        return self.misbehave(fault) if rank == self.rank else "fine"

    def echo(self, *args: Any, **kwargs: Any) -> list[Any]:
        return [self.rank, list(args), kwargs]

    def who(self) -> dict[str, Any]:
        """What the rank's process looks like from inside."""
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        return {
            "rank": self.rank,
            "pid": os.getpid(),
            "cores": cores,
            "threads": os.environ.get("OMP_NUM_THREADS", ""),
            "torch": "torch" in sys.modules,
            "main": getattr(sys.modules["__main__"], "__file__", ""),
        }

    def seen_steps(self) -> list[int]:
        return self.steps

    def unencodable(self) -> object:
        return object()

    def log(self, level: str, text: str) -> None:
        get_logger("lockstep.testing").log(logging.getLevelName(level.upper()), "%s", text)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def child(self) -> int:
        """Start a process of its own; its pid."""
        return subprocess.Popen(["sleep", "1000"]).pid
