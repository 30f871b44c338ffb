"""Results as JSON lines, one per figure, appended to a file as they come; and the table printed at the end."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from statistics import median
from typing import Any

from engines import Engine, Run

from lockstep.cli.bench import machine

TORCH_LIMIT = "limit"  # the engine name of what no engine can beat


def command_line() -> str:
    """What the user typed, the home folder as ~: results are for others to repeat."""
    return shlex.join(["python", *sys.argv]).replace(f"{Path.home()}/", "~/")


class Report:
    """Knows what is the same on every line. `limit`: the bandwidth measured last, in GB/s by threads and pages."""

    def __init__(self, out: Path | None, run: Run) -> None:
        self.out, self.run, self.command = out, run, command_line()
        self.machine = machine.describe()
        self.limit: dict[str, float] = {}
        self.versions: dict[str, str] = {}
        self.table: dict[str, dict[str, list[float]]] = {}  # metric -> column -> values

    def engine(self, engine: Engine, metric: str, values: list[float], unit: str, **more: Any) -> None:
        """A figure of an engine."""
        about = {
            "engine": engine.name,
            "label": engine.label,
            "version": self.versions.get(engine.label, ""),
            "dtype": engine.more.get("dtype", self.run.dtype),
            "tp": engine.tp,
            "pp": int(engine.more.get("pipeline_parallel_size", 1)),
            "dp": int(engine.more.get("data_parallel_size", 1)),
            "threads": engine.threads(self.run),
        }
        settings = {**engine.more, **engine.variables}
        self._line({**about, **({"settings": settings} if settings else {})}, metric, values, unit, more)
        self.table.setdefault(metric, {})[engine.label] = values

    def other(self, name: str, metric: str, values: list[float], unit: str, **more: Any) -> None:
        """A figure that is not an engine's: a limit, or a ratio of two of them."""
        about = {"engine": name, "label": name, "version": f"torch {self.machine['torch']}", "dtype": self.run.dtype}
        self._line({**about, "threads": len(self.run.cores)}, metric, values, unit, more)
        if unit == "x":
            self.table.setdefault(metric, {})[name] = values

    def _line(self, about: dict[str, Any], metric: str, values: list[float], unit: str, more: dict[str, Any]) -> None:
        line = {**about, "commit": self.machine["commit"], "model": Path(self.run.model).name, "metric": metric}
        line |= {"value": _short(median(values)), "unit": unit, "all": [_short(v) for v in values]}
        line |= {"min": _short(min(values)), "max": _short(max(values)), **more}
        line |= {"prefix_caching": self.run.prefix_caching, "kv_gib": self.run.kv_gib, "limit": self.limit, "command": self.command}
        text = json.dumps({**line, "machine": self.machine})
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(text + "\n")
        spread = f"  ({line['min']:g} - {line['max']:g})" if len(values) > 1 else ""
        notes = "".join(f"  {key} {value}" for key, value in more.items() if isinstance(value, int | float | str))
        print(f"{about['label']:>34}  {metric:<24} {line['value']:>10g} {unit}{spread}{notes}", flush=True)

    def ratios(self, metric: str, engines: list[Engine], rounds: list[dict[str, float]], limit: list[float] | None = None) -> None:
        """Each of ours over the best peer, over our first, and over the limit; within each round, then the median."""
        ours = [e for e in engines if e.name == "lockstep"]
        peers = [e for e in engines if e.name != "lockstep"]
        best = max(peers, key=lambda e: median(r[e.label] for r in rounds)) if peers else None
        for engine in ours:
            pairs = [best, ours[0] if engine is not ours[0] else None]
            for other in (e for e in pairs if e is not None):
                values = [r[engine.label] / r[other.label] for r in rounds]
                self.other(f"{engine.label} / {other.label}", metric, values, "x", best_peer=other is best)
            if limit is not None:
                values = [r[engine.label] / most for r, most in zip(rounds, limit, strict=True)]
                self.other(f"{engine.label} / {TORCH_LIMIT}", metric, values, "x")

    def print_table(self) -> None:
        """A row per metric: every engine's median with its spread, then the ratios."""
        for metric, columns in self.table.items():
            print(f"\n{metric}")
            for label, values in columns.items():
                spread = f"   {_short(min(values)):g} .. {_short(max(values)):g}" if len(values) > 1 else ""
                print(f"  {label:<42} {_short(median(values)):>10g}{spread}")


def _short(value: float) -> float:
    return float(f"{value:.5g}")
