#!/usr/bin/env python3
"""How long a step's plan takes to all ranks and its result back: the executor with ranks that compute nothing.

    python benchmarks/plan_broadcast.py [--ranks 2] [--steps 2000] [--rows 8] [--max-us 80]

The engine and the ranks are processes of their own (3 with 2 ranks), on the cores that this machine has. Prints a JSON line
for each way of asking:

  back to back   the next plan goes out as soon as the result is there
  paced          the engine waits between steps, as for a model that takes a while: everybody has gone to sleep
  two in flight  plans are sent one ahead, as with asynchronous scheduling: microseconds per step

`value` (the median, in microseconds) is from execute_model(plan) to its result, on the caller's clock. With --max-us, exits 1
when the median back to back is above it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lockstep.cli.bench import machine
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig, ModelConfig, ParallelConfig, RuntimeConfig
from lockstep.executor.contract import Executor
from lockstep.executor.factory import make_executor
from lockstep.protocol import StepPlan

SPEC = ModelSpec("LlamaForCausalLM", 64, 2, 4, 2, 16, 128, 256, 512)
WORKER = "lockstep.testing.fake_worker:FakeWorker"
WARM_UP = 100


def plan(step: int, rows: int) -> StepPlan:
    """A decoding step of `rows` requests."""
    return StepPlan(step, list(range(rows)), [100 + step] * rows, [1] * rows, [True] * rows)


def back_to_back(executor: Executor, steps: int, rows: int, pause_s: float = 0.0) -> list[float]:
    """Seconds of each round trip; `pause_s` between them."""
    found = []
    for step in range(steps):
        if pause_s:
            time.sleep(pause_s)
        order = plan(step, rows)
        start = time.perf_counter()
        result = executor.execute_model(order).result(10.0)
        found.append(time.perf_counter() - start)
        assert result.step == step and len(result.tokens) == rows
    return found


def two_in_flight(executor: Executor, steps: int, rows: int) -> list[float]:
    """Seconds between results when one plan is always ahead."""
    found = []
    ahead = executor.execute_model(plan(0, rows))
    last = time.perf_counter()
    for step in range(1, steps):
        following = executor.execute_model(plan(step, rows))
        ahead.result(10.0)
        now = time.perf_counter()
        found.append(now - last)
        ahead, last = following, now
    ahead.result(10.0)
    return found


def report(name: str, seconds: list[float], args: argparse.Namespace, noise: float) -> float:
    """Print one JSON line; the median in microseconds."""
    ordered = sorted(seconds[min(WARM_UP, len(seconds) // 2) :])
    values = {"median": median(ordered), "p90": ordered[int(len(ordered) * 0.9)], "p99": ordered[int(len(ordered) * 0.99)]}
    us = {key: round(value * 1e6, 1) for key, value in values.items()}
    line: dict[str, Any] = {
        "engine": "lockstep",
        "metric": f"plan_round_trip_{name.replace(' ', '_')}",
        "value": us["median"],
        "unit": "us",
    }
    line |= {"ranks": args.ranks, "rows": args.rows, "steps": len(ordered), "p90_us": us["p90"], "p99_us": us["p99"]}
    line |= {"other_cores": noise, "command": "python " + " ".join(sys.argv), "commit": machine.commit(), "machine": machine.describe()}
    print(json.dumps(line), flush=True)
    return values["median"] * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=8, help="requests in a step")
    parser.add_argument("--pause-ms", type=float, default=5.0, help="of the paced round trips")
    parser.add_argument("--max-us", type=float, help="fail above this median, back to back")
    args = parser.parse_args()
    config = EngineConfig(
        model=ModelConfig(),
        parallel=ParallelConfig(tensor_parallel_size=args.ranks, distributed_executor_backend="mp"),
        runtime=RuntimeConfig(log_level="error"),
    )
    ways: dict[str, Callable[[Executor], list[float]]] = {
        "back to back": lambda executor: back_to_back(executor, args.steps + WARM_UP, args.rows),
        "paced": lambda executor: back_to_back(executor, args.steps // 10 + WARM_UP, args.rows, args.pause_ms / 1e3),
        "two in flight": lambda executor: two_in_flight(executor, args.steps + WARM_UP, args.rows),
    }
    executor = make_executor(config, SPEC, Path("."), worker_cls=WORKER)
    figures = {}
    try:
        for name, measure in ways.items():
            noise = machine.Noise()
            figures[name] = report(name, measure(executor), args, noise.other_cores())
    finally:
        executor.shutdown()
    if args.max_us is not None and figures["back to back"] > args.max_us:
        raise SystemExit(f"back to back took {figures['back to back']:.1f} us, more than {args.max_us:g}")


if __name__ == "__main__":
    main()
