"""What ranks run that test the external launcher's executor around fake workers, in torch's default group that the test made."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from lockstep.distributed import parallel_state
from lockstep.executor.contract import Executor, ExecutorError
from lockstep.executor.factory import make_executor
from lockstep.testing.executors import FAKE_WORKER, SPEC, decode_plan, fake_config, prefill_plan


def executor(rank: int, world_size: int, tp: int = 0, **parallel: Any) -> Executor:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": 1}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="localhost")
    config = fake_config(tp or world_size, backend="external_launcher", **parallel)
    return make_executor(config, SPEC, Path("."), worker_cls=FAKE_WORKER)


def contract(rank: int, world_size: int, pp: int) -> dict[str, Any]:
    """A whole life, twice."""
    seen: dict[str, Any] = {}
    for life in range(2):
        cores = os.sched_getaffinity(0)
        ranks = executor(rank, world_size, world_size // pp, pipeline_parallel_size=pp, check_collectives=life == 1)
        ranks.initialize_kv_cache(7)
        depth = ranks.max_concurrent_batches
        tokens, flying = [], []
        for step in range(20):
            flying.append(ranks.execute_model(prefill_plan(step) if step % 5 == 0 else decode_plan(step)))
            if len(flying) == depth:
                tokens.append(flying.pop(0).result(20).tokens)
        tokens += [future.result(20).tokens for future in flying]
        try:
            ranks.collective_rpc("misbehave", ("raise:oops",))
        except ExecutorError as e:
            seen["raised"] = str(e)
        seen |= {
            "memory": [(m.rank, m.kv_bytes) for m in ranks.memory()],
            "tokens": tokens,
            "depth": depth,
            "echo": ranks.collective_rpc("echo", ([1, "a", None],), {"k": rank}),
        }
        ranks.shutdown()
        ranks.shutdown()
        assert os.sched_getaffinity(0) == cores
        assert parallel_state.find_group("tp") is None and parallel_state.find_group("world") is not None
    return seen


def failing(rank: int, world_size: int, how: str) -> dict[str, Any]:
    """One rank does something else than the other; what both hear, and how soon."""
    ranks = executor(rank, world_size, distributed_timeout_seconds=30.0, check_collectives=how == "plan")
    ranks.initialize_kv_cache(7)
    heard: list[str] = []
    ranks.register_failure_callback(lambda e: heard.append(str(e)))
    ranks.execute_model(prefill_plan(0)).result(20)
    began = time.monotonic()
    try:
        if how == "call":
            ranks.collective_rpc("ping" if rank == 1 else "seen_steps")
        elif how == "plan":
            ranks.execute_model(prefill_plan(1) if rank == 1 else decode_plan(1)).result(20)
        else:
            if rank == 0:
                ranks._worker.step_fault = "raise:broken"  # type: ignore[attr-defined]
            ranks.execute_model(decode_plan(1)).result(20)
    except ExecutorError as e:
        assert heard == [str(e)]
        try:
            ranks.memory()
        except ExecutorError as again:
            assert again is e
        report = {"error": str(e), "rank": e.rank, "seconds": time.monotonic() - began}
        ranks.shutdown()
        return report
    return {"error": ""}


def refused(rank: int, world_size: int) -> list[str]:
    """Settings that differ between ranks; a second executor beside a living one; sizes that the program's groups do not have."""
    found = []
    for attempt in ("differs", "second", "sizes"):
        first = executor(rank, world_size) if attempt == "second" else None
        if attempt == "sizes":
            parallel_state.initialize_model_parallel(1, world_size)
        try:
            executor(rank, world_size, **({"step_s": 10.0 + rank} if attempt == "differs" else {}))
        except ValueError as e:
            found.append(str(e))
        if first is not None:
            first.shutdown()
    parallel_state.destroy_model_parallel()
    return found
