#!/usr/bin/env python3
"""Write docs/performance.md from benchmarks/results/*.jsonl: `python scripts/performance_table.py [--check]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
HEAD = """# Measured

Made by `scripts/performance_table.py` from `benchmarks/results/*.jsonl`, where every line has all repetitions, the exact
command, the commit and the machine. Figures are medians. Compare lines of one file only: they were measured in one run,
in turn; machines differ, and so does one machine from hour to hour.
"""


def results() -> list[tuple[str, list[dict[str, Any]]]]:
    """(file name, result of every line) for every result file, in order."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
    return [(f.stem, [json.loads(line) for line in f.read_text().splitlines() if line.strip()]) for f in files]


def row(result: dict[str, Any]) -> str:
    """One result as a table row."""
    spread = f"{min(result['all']):g} - {max(result['all']):g}" if len(result.get("all", [])) > 1 else ""
    shape = " ".join(str(result[k]) if k != "tp" else f"tp={result[k]}" for k in ("model", "dtype", "tp") if k in result)
    shape += "".join(f" {k}={result[k]}" for k in ("pp", "dp") if result.get(k, 1) != 1)
    if "ranks" in result:
        shape = f"{shape} {result['ranks']} ranks".strip()
    if "measured_over_predicted" in result:
        shape += f", batch {result['batch']}, predicted {result['predicted']:g}"
    more = f", {result['over_torch_s']:g} s over torch" if "over_torch_s" in result else ""
    if result.get("clean", len(result.get("all", []))) < len(result.get("all", [])):
        more += f" ({len(result['all']) - result['clean']} of {len(result['all'])} disturbed by other programs)"
    return f"| {result['engine']} | {result['metric']} | {result['value']:g} {result['unit']}{more} | {spread} | {shape} |"


# of a load, not found by it
SETTINGS = {"round", "tp", "dp", "concurrency", "streams", "phases", "seconds", "output_tokens", "failed", "other_cores"}


def shape_of(result: dict[str, Any]) -> str:
    """Of what load the many figures of a result are."""
    return " ".join(f"{k}={result[k]}" for k in ("model", "tp", "concurrency", "streams", "round") if k in result)


def runs(found: list[dict[str, Any]]) -> list[int]:
    """Which of those that cannot be told apart each result with many figures is, from 1 on; 0 where it is the only one."""
    keys = [(r.get("engine"), r["metric"], shape_of(r)) if "value" not in r else None for r in found]
    return [keys[: i + 1].count(key) if key and keys.count(key) > 1 else 0 for i, key in enumerate(keys)]


def wide(result: dict[str, Any], run: int) -> list[str]:
    """The rows of a result that has many figures by name, some of them with percentiles. run: its number among several alike, or 0."""
    who, found = result.get("engine", "lockstep"), []
    shape = shape_of(result) + (f" run={run}" if run else "")
    for name, value in result.items():
        several = {f"{name} {part}": each for part, each in value.items()} if isinstance(value, dict) else {name: value}
        for label, each in several.items() if name not in SETTINGS | {"machine"} else ():
            if isinstance(each, int | float):
                found.append(f"| {who} | {result['metric']}: {label} | {each:g} | | {shape} |")
    return found


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, found in results():
        machine = found[0]["machine"]
        where = f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, commit {machine['commit']}"
        parts.append(f"\n## {name}\n\n{where}\n\n    {found[0]['command']}\n")
        parts.append("| engine | metric | median | min - max | what |\n|---|---|---|---|---|")
        for result, run in zip(found, runs(found), strict=True):
            parts += [row(result)] if "value" in result else wide(result, run)
    return "\n".join(parts) + "\n"


def main() -> int:
    """Write the page; with --check, only say whether it is up to date (exit 1 when not)."""
    if "--check" in sys.argv:
        return 0 if PAGE.exists() and PAGE.read_text() == page() else 1
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
