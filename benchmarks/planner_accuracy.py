#!/usr/bin/env python3
"""Print how far the planner is off, on everything that was measured.

    python benchmarks/planner_accuracy.py > benchmarks/results/planner_accuracy.txt

Computed from the tables in tests/planner/data with the constants and samples in lockstep/planner/data: no device is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lockstep.planner import catalogue
from lockstep.planner.fit import Errors
from lockstep.testing import planner_accuracy as accuracy

HEAD = """The planner against measurements on H100 (SXM5). Errors are mean absolute errors in percent, of sizes that nothing was fitted
to. Of every table one half of the sizes (every other one) tries what the other half gives, both ways round. formula: constants fitted
to that half. table: the formula corrected by that half's own measurements, interpolated in logarithms. priced by: what `lockstep plan`
takes, all samples then: the table where it was better, both ways together. data sheet: peak flops, memory and link bandwidth alone.
"""


def operations() -> None:
    """One line per family, and the groups that the project promises a bound for."""
    lines = accuracy.all_lines(catalogue.device_shipped("H100"))
    print(f"{'':52s}{'odd sizes by even ones':>23s}{'even by odd':>23s}{'as priced':>11s}")
    print(f"{'family':52s}{2 * '      n formula   table'}{'both':>11s}  {'priced by':9s}{'data sheet':>11s}")
    group = ""
    for line in lines:
        if line.group != group:
            group = line.group
            inside = [other for other in lines if other.group == group]
            together = accuracy.pooled(errors for other in inside for errors in other.used)
            ways = [accuracy.pooled(other.ways[i].formula for other in inside) for i in (0, 1)]
            tables = [accuracy.pooled(other.ways[i].table for other in inside) for i in (0, 1)]
            print(f"{group:52s}{_pairs(zip(ways, tables, strict=True))}{together.mape:11.1%}")
        used = accuracy.pooled(line.used).mape
        by = "table" if line.by_table else "formula"
        print(f"  {line.name:50s}{_pairs(line.ways)}{used:11.1%}  {by:9s}{line.sheet.mape:11.1%}")


def _pairs(ways: Iterable[tuple[Errors, Errors]]) -> str:
    return "".join(f"{formula.n:7d}{formula.mape:8.1%}{table.mape:8.1%}" for formula, table in ways)


def grid() -> None:
    """End to end against the peer's predictions."""
    cluster = catalogue.cluster("8xH100")
    print("\nWhole steps against aiconfigurator's static grid (its own full tables; 4 dense models, TP 1-8)")
    for name, found in zip(("TTFT", "TPOT", "TTFT, held-out rows", "TPOT, held-out rows"), accuracy.grid_errors(cluster), strict=True):
        print(f"  {name:50s}{found.n:6d}{found.mape:9.1%}{found.median:8.1%}")


def servers() -> None:
    """Real runs, before and after calibration."""
    cluster = catalogue.cluster("8xH100")
    print("\nReal servers on H100, at the concurrencies that nothing was fitted to (TTFT: without runs that waited for memory)")
    print(f"  {'deployment':50s}{'n':>6s}{'TPOT':>9s}{'calibrated':>12s}{'TTFT':>9s}{'calibrated':>12s}{'waited':>8s}")
    for d in accuracy.all_deployments(cluster):
        print(f"  {d.name:50s}{d.runs:6d}{d.tpot:9.1%}{d.tpot_calibrated:12.1%}{d.ttft:9.1%}{d.ttft_calibrated:12.1%}{d.waited:8d}")


def unknown() -> None:
    """What six numbers give."""
    print("\nA device that nobody measured: H100's constants with the A100's data sheet, on the A100's tables")
    for name, error in accuracy.transferred(catalogue.device_shipped("H100"), catalogue.device_shipped("A100")).items():
        print(f"  {name:50s}{'':6s}{error:9.1%}")


def main() -> int:
    """Print everything."""
    print(HEAD)
    operations()
    grid()
    servers()
    unknown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
