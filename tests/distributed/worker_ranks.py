"""What the ranks of the worker tests run: a whole engine on every rank, each over its own worker.

Every rank's engine makes the same plans from the same results, so no plan needs to be sent: it is the workers' own
collectives that are tested. Rank 0 reports; the others learn its result by a broadcast, and could not go on without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from lockstep.config.validate import resolve
from lockstep.distributed import parallel_state
from lockstep.distributed.groups import ParallelGroups
from lockstep.engine.core import EngineCore
from lockstep.executor.contract import Executor, RankMemory
from lockstep.protocol import NewRequest, SamplingParams, StepPlan, StepResult
from lockstep.worker.worker import Worker
from tests.parity.generate_cases import ROOMY, check_stress, engine_config, request, run_waves


def make_worker(rank: int, folder: str, tp: int, size: dict[str, int], pp: int = 1) -> Worker:
    """A worker with its model loaded, in the ranks' own groups."""
    torch.set_num_threads(1)
    parallel_state.initialize_model_parallel(tp, pp)
    config, spec, path = resolve(engine_config(folder, tp, size, pipeline_parallel_size=pp))
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


# one request each: every sampling parameter is in at least one of them
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.8, "seed": 1, "top_p": 0.9, "logprobs": 3},
    {"temperature": 1.0, "seed": 2, "top_k": 20, "repetition_penalty": 1.3},
    {"temperature": 1.2, "seed": 3, "min_p": 0.05, "presence_penalty": 0.5, "frequency_penalty": 0.2, "prompt_logprobs": 2},
    {"temperature": 0.0, "logprobs": 0, "logit_bias": {7: 3.0, 11: -50.0}},
    {"temperature": 0.7, "seed": -5, "allowed_token_ids": list(range(10, 200))},
    {"temperature": 0.9, "seed": 6, "min_tokens": 10, "stop_token_ids": [50], "bad_words_token_ids": [[3], [4, 5]]},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.0, "prompt_logprobs": 0},
]


def sample(rank: int, world_size: int, folder: str, prompts: list[list[int]], size: dict[str, int], pp: int) -> dict[str, Any]:
    """One request for each entry of SAMPLING, together in a cache too small for them; the same again with other seeds."""
    worker = make_worker(rank, folder, world_size // pp, size, pp)
    core = EngineCore(worker.config, worker.spec, RankExecutor(worker))

    def wave(shift: int) -> list[dict[str, Any]]:
        found = [{"tokens": [], "logprobs": [], "prompt_logprobs": []} for _ in SAMPLING]
        for i, (prompt, params) in enumerate(zip(prompts, SAMPLING, strict=True)):
            core.add_request(request(f"{shift}.{i}", prompt, **{**params, "seed": params.get("seed", 0) + shift}))
        while core.has_unfinished():
            for out in core.step():
                assert out.error is None, out
                mine = found[int(out.request_id.partition(".")[2])]
                mine["tokens"] += out.new_token_ids
                mine["logprobs"] += msgspec.to_builtins(out.logprobs or [])
                mine["prompt_logprobs"] += msgspec.to_builtins(out.prompt_logprobs or [])
        return found

    first, other = wave(0), wave(1000)
    assert core.stats().preemptions > 0, "the cache was meant to be too small"
    assert [len(r["prompt_logprobs"]) for r in first] == [
        len(prompt) - 1 if "prompt_logprobs" in params else 0 for prompt, params in zip(prompts, SAMPLING, strict=True)
    ]
    return {
        "tokens": [r["tokens"] for r in first],
        "logprobs": [r["logprobs"] for r in first],
        "prompt_logprobs": [r["prompt_logprobs"] for r in first],
        "other_seed": [r["tokens"] for r in other],
        "state": digest_of(worker),
    }


def sampler_raises(rank: int, world_size: int, folder: str, prompt: list[int]) -> None:
    """The output rank raises while sampling; the other must not be left waiting for ever."""
    worker = make_worker(rank, folder, world_size, ROOMY)
    worker.initialize_kv_cache(8)

    def broken(*args: Any) -> None:
        raise RuntimeError("injected")

    worker.runner.sampler.sample = broken  # type: ignore[method-assign,assignment]
    new = NewRequest(0, "r", prompt, len(prompt), [0], SamplingParams(temperature=1.0), 0)
    worker.execute_model(StepPlan(0, [0], [0], [len(prompt)], [True], new=[new]))


def digest_of(worker: Worker) -> list[int]:
    """A few numbers that differ when two batch states differ."""
    state = worker.runner.state
    weights = np.arange(1, state.tokens.shape[1] + 1)
    return [int(state.lengths.sum()), int((state.tokens * weights).sum()), int(state.block_tables.sum()), int(state.active.sum())]


def generate(rank: int, world_size: int, folder: str, prompts: list[list[int]], size: dict[str, int], stress: bool) -> dict[str, Any]:
    """Both waves on this rank's engine."""
    worker = make_worker(rank, folder, world_size, size)
    core = EngineCore(worker.config, worker.spec, RankExecutor(worker))
    tokens = run_waves(core, prompts)
    if stress:
        check_stress(core)
    return {
        "tokens": tokens,
        "state": digest_of(worker),
        "memory": msgspec.to_builtins(worker.memory()),
        "digest": worker.parameter_digest(),
        "ping": worker.ping(),
        "summary": worker.memory_summary(),
    }
