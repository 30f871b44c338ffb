"""What the ranks of the worker tests run: a whole engine on every rank, each over its own worker.

Every rank's engine makes the same plans from the same results, so no plan needs to be sent: it is the workers' own
collectives that are tested. Rank 0 reports; the others learn its result by a broadcast, and could not go on without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch

from lockstep.config.validate import resolve
from lockstep.distributed import parallel_state
from lockstep.distributed.groups import ParallelGroups
from lockstep.engine.core import EngineCore
from lockstep.executor.contract import Executor, RankMemory
from lockstep.protocol import StepPlan, StepResult
from lockstep.worker.worker import Worker
from tests.parity.generate_cases import check_stress, engine_config, run_waves


def make_worker(rank: int, folder: str, tp: int, size: dict[str, int], pp: int = 1) -> Worker:
    """A worker with its model loaded, in the ranks' own groups."""
    torch.set_num_threads(1)
    parallel_state.initialize_model_parallel(tp, pp)
    config, spec, path = resolve(engine_config(folder, tp, size))
    worker = Worker(config, spec, Path(path), rank, rank, ParallelGroups.current(), None)
    worker.init_device()
    worker.load_model()
    return worker


class Finished:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def done(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> StepResult:
        return self._result


class RankExecutor(Executor):
    """This rank's worker as an executor; two steps may be in flight, so plans are made before results are known."""

    max_concurrent_batches = 2

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.world = worker.groups.world

    def memory(self) -> list[RankMemory]:
        return [self.worker.memory()] * self.world.world_size

    def initialize_kv_cache(self, num_blocks: int) -> None:
        self.worker.initialize_kv_cache(num_blocks)

    def execute_model(self, plan: StepPlan) -> Finished:
        result = self.worker.execute_model(plan)
        reporter = self.world.world_size - self.worker.groups.tp.world_size
        assert (result is not None) == (self.world.rank_in_group == reporter), "the output rank, and only it, reports"
        data = self.world.broadcast_object(None if result is None else msgspec.to_builtins(result), src=reporter)
        return Finished(msgspec.convert(data, StepResult))

    def collective_rpc(self, method: str, args: Any = (), kwargs: Any = None, timeout: float | None = None) -> list[Any]:
        raise NotImplementedError

    def check_health(self) -> None: ...

    def register_failure_callback(self, callback: Any) -> None: ...

    def shutdown(self) -> None: ...


def generate(rank: int, world_size: int, folder: str, prompts: list[list[int]], size: dict[str, int], stress: bool) -> dict[str, Any]:
    """Both waves on this rank's engine."""
    worker = make_worker(rank, folder, world_size, size)
    core = EngineCore(worker.config, worker.spec, RankExecutor(worker))
    tokens = run_waves(core, prompts)
    if stress:
        check_stress(core)
    state = worker.runner.state
    return {
        "tokens": tokens,
        "state": [int(state.lengths.sum()), int(state.tokens.sum()), int(state.block_tables.sum())],
        "memory": msgspec.to_builtins(worker.memory()),
        "digest": worker.parameter_digest(),
        "ping": worker.ping(),
        "summary": worker.memory_summary(),
    }
