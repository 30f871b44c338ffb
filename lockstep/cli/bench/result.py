"""One result, one JSON line: the figure, every repetition, what it ran on, and the limit measured beside it."""

from __future__ import annotations

import json
import sys
from statistics import median
from typing import Any

from lockstep.cli.bench import machine
from lockstep.config.tree import EngineConfig
from lockstep.executor.affinity import plan_here


class Reporter:
    """Prints results: JSON lines on standard output with `--json`, else one readable line each.

    The memory bandwidth is measured when the reporter is made and again at `close`, because shared machines drift.
    """

    def __init__(self, config: EngineConfig, model: str, command: str, as_json: bool) -> None:
        parallel = config.parallel
        ranks = parallel.world_size
        self.as_json, self.threads = as_json, [share.threads for share in plan_here(ranks, parallel)]
        self.base: dict[str, Any] = {
            "model": model,
            "dtype": config.model.dtype,
            "device": config.runtime.device,
            "tp": config.parallel.tensor_parallel_size,
            "pp": config.parallel.pipeline_parallel_size,
            "dp": config.parallel.data_parallel_size,
            "threads_per_rank": self.threads[0] if len(set(self.threads)) == 1 else self.threads,
        }
        self.machine = machine.describe()
        self.command = command
        self.membw(when="start")

    def emit(self, engine: str, metric: str, values: list[float], unit: str, **more: Any) -> None:
        """One result: the median of `values`, and all of them."""
        line = {"engine": engine, **self.base, "metric": metric, "value": round(median(values), 4), "unit": unit}
        line |= {"all": [round(v, 4) for v in values], **more, "command": self.command, "machine": self.machine}
        if self.as_json:
            print(json.dumps(line), flush=True)
            return
        spread = f" (of {', '.join(f'{v:g}' for v in line['all'])})" if len(values) > 1 else ""
        notes = "".join(f", {k} {v}" for k, v in more.items() if not isinstance(v, dict | list))
        print(f"{engine:>14}  {metric:<28} {line['value']:>10g} {unit}{spread}{notes}", flush=True)

    def membw(self, when: str) -> None:
        """The memory read bandwidth now: what decode cannot beat on a CPU."""
        threads = int(self.machine["cores"])
        self.emit("limit", f"read_bandwidth_{when}", [machine.read_bandwidth_gbps(min(threads, 16))], "GB/s", threads=threads)

    def note(self, text: str) -> None:
        """A remark for people, never on the JSON stream."""
        print(text, file=sys.stderr, flush=True)
