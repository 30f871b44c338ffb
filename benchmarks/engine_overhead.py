"""What the engine itself costs per step: decoding requests on an executor that does nothing.

    python benchmarks/engine_overhead.py [--running 256] [--steps 3000] [--depth 2] [--max-ms 1.0]

Prints one JSON line. `step_ms` is one EngineCore.step() in steady state: planning, building the plan, taking the tokens
in, ending and hashing what is due, and the outputs. With --max-ms, exits 1 when the median is above it.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from lockstep.engine.core import EngineCore
from lockstep.protocol import EngineRequest, SamplingParams
from lockstep.testing.fakes import NoopExecutor

PROMPT_TOKENS = 128
SPEC = ModelSpec("LlamaForCausalLM", 4096, 32, 32, 8, 128, 14336, 128_256, 131_072)


def make_core(running: int, steps: int, depth: int) -> EngineCore:
    """An engine with `running` requests, all decoding, none of which ends within `steps`."""
    length = PROMPT_TOKENS + steps + 64
    config = EngineConfig(
        model=ModelConfig(max_model_len=length),
        cache=CacheConfig(num_gpu_blocks_override=running * (length // 16 + 2)),
        scheduler=SchedulerConfig(max_num_seqs=running, max_num_batched_tokens=8192),
    )
    core = EngineCore(config, SPEC, NoopExecutor(max_concurrent_batches=depth))
    for i in range(running):
        prompt = [(7919 * i + j) % SPEC.vocab_size for j in range(PROMPT_TOKENS)]
        sampling = SamplingParams(max_tokens=None, stop_token_ids=[2])
        core.add_request(EngineRequest(request_id=f"request-{i}", prompt_token_ids=prompt, sampling=sampling, seed=i, eos_token_ids=[0]))
    while core.stats().waiting or core.stats().generated_tokens < running:
        core.step()
    return core


def timed(call: Callable[[], Any], into: list[float]) -> Any:
    """The call's result; its time in ms is added to `into`."""
    started = time.perf_counter()
    result = call()
    into.append((time.perf_counter() - started) * 1e3)
    return result


def summary(times_ms: list[float]) -> dict[str, float]:
    """Median and tail, in ms."""
    ordered = sorted(times_ms)
    return {
        "median": round(statistics.median(ordered), 4),
        "p99": round(ordered[int(len(ordered) * 0.99)], 4),
        "max": round(ordered[-1], 4),
    }


def measure(running: int, steps: int, depth: int) -> dict[str, Any]:
    """Whole steps, then (on a fresh engine) its halves one by one."""
    core, whole = make_core(running, steps, depth), list[float]()
    gc.collect()
    gc.freeze()
    for _ in range(steps):
        outputs = timed(core.step, whole)
        assert len(outputs) == running, f"{len(outputs)} outputs of {running} requests"
    core, plan, update = make_core(running, steps, 1), list[float](), list[float]()
    for _ in range(steps):
        step = timed(core.scheduler.schedule, plan)
        assert len(step.plan.slots) == running
        result = core.executor.execute_model(step.plan).result()
        timed(lambda step=step, result=result: (core.scheduler.update(step, result), core.scheduler.take_outputs()), update)
    return {
        "benchmark": "engine_overhead",
        "running": running,
        "steps": steps,
        "depth": depth,
        "step_ms": summary(whole),
        "schedule_ms": summary(plan),
        "update_ms": summary(update),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--max-ms", type=float, default=None)
    args = parser.parse_args()
    report = measure(args.running, args.steps, args.depth)
    print(json.dumps(report))
    return int(args.max_ms is not None and report["step_ms"]["median"] > args.max_ms)


if __name__ == "__main__":
    sys.exit(main())
