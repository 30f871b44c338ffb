"""What the engine itself costs per step: decoding requests on an executor that does nothing.

    python benchmarks/engine_overhead.py [--running 256] [--steps 3000] [--depth 2] [--max-ms 1.0]

Prints one JSON line. `step_ms` is one EngineCore.step() in steady state: planning, building the plan, taking the tokens
in, ending and hashing what is due, and the outputs. Figures named `cpu_` are this thread's processor time, which other
load on the machine leaves alone. With --max-ms, exits 1 when the median of step_ms is above it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lockstep.cli.bench import machine
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


class Times:
    """Durations of one kind of call, in ms: on the wall, and of this thread's processor time (what a busy host leaves alone)."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def run(self, call: Callable[[], Any]) -> Any:
        """Call it, and keep how long that took."""
        cpu, wall = time.thread_time(), time.perf_counter()
        result = call()
        self.wall.append((time.perf_counter() - wall) * 1e3)
        self.cpu.append((time.thread_time() - cpu) * 1e3)
        return result

    def summary(self) -> dict[str, float]:
        """Median and tail."""
        return {**_quantiles(self.wall), **{f"cpu_{name}": value for name, value in _quantiles(self.cpu).items()}}


def _quantiles(times_ms: list[float]) -> dict[str, float]:
    ordered = sorted(times_ms)
    values = {"median": statistics.median(ordered), "p99": ordered[int(len(ordered) * 0.99)], "max": ordered[-1]}
    return {name: round(value, 4) for name, value in values.items()}


def measure(running: int, steps: int, depth: int) -> dict[str, Any]:
    """Whole steps, then (on a fresh engine) its halves one by one."""
    core, whole = make_core(running, steps, depth), Times()
    gc.collect()
    gc.freeze()
    for _ in range(steps):
        outputs = whole.run(core.step)
        assert len(outputs) == running, f"{len(outputs)} outputs of {running} requests"
    core, plan, update = make_core(running, steps, 1), Times(), Times()
    for _ in range(steps):
        step = plan.run(core.scheduler.schedule)
        assert len(step.plan.slots) == running
        result = core.executor.execute_model(step.plan).result()
        update.run(lambda step=step, result=result: (core.scheduler.update(step, result), core.scheduler.take_outputs()))
    return {
        "engine": "lockstep",
        "metric": f"step_overhead_{running}_running",
        "value": whole.summary()["median"],
        "unit": "ms",
        "all": [],
        "command": f"python benchmarks/engine_overhead.py --running {running} --steps {steps} --depth {depth}",
        "running": running,
        "steps": steps,
        "depth": depth,
        "step_ms": whole.summary(),
        "schedule_ms": plan.summary(),
        "update_ms": update.summary(),
        "machine": machine.describe(),
        "load_1m": round(os.getloadavg()[0], 1),
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
