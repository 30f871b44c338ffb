"""Every accuracy that the planner claims, computed: held-out halves of the tables, the static grid, real servers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median

from lockstep.planner.collectives import ring_s
from lockstep.planner.families import Family, Sample, family_errors, fit_family, with_table
from lockstep.planner.fit import Errors, errors, halves
from lockstep.planner.hardware import Cluster, Device
from lockstep.planner.load import Serving
from lockstep.planner.serving import fit_serving, steady, tpot_error, ttft_error
from lockstep.testing import planner_tables as tables
from lockstep.testing.planner_runs import deployments, runs, static_grid

TINY = 1e-12  # a launch of no time
ROOF = (TINY, 1.0, 1.0, 0.0)
OP_NAMES = {"all_reduce": "all-reduce", "all_reduce_nccl": "all-reduce (NCCL)", "all_gather": "all-gather"}
OP_NAMES |= {"reduce_scatter": "reduce-scatter", "all_to_all": "all-to-all"}


@dataclass(frozen=True)
class Line:
    """A family's errors on the sizes that nothing was fitted to: `formula`, with the fitted half as a `table`, data sheet alone."""

    group: str
    name: str
    formula: Errors
    table: Errors
    sheet: Errors


def tried(group: str, name: str, device: Device, measured: tables.Measured, sheet: tuple[float, ...], *, swap: bool = False) -> Line:
    """The device's committed constants on the held-out half; with `swap`, constants fitted to that half on the other one."""
    family, samples = measured
    fitted, held = halves(samples, lambda s: s.size)
    if swap:
        fitted, held = held, fitted
        device = fit_family(family, device, fitted)
    return Line(group, name, family_errors(family, device, held), *_others(family, device, fitted, held, sheet))


def _others(family: Family, device: Device, fitted: list[Sample], held: list[Sample], sheet: tuple[float, ...]) -> tuple[Errors, Errors]:
    table = family_errors(family, with_table(family, device, fitted), held)
    return table, family_errors(family, family.put(device, sheet), held)


def operations(device: Device) -> Iterator[Line]:
    """Kernels on H100."""
    yield tried("GEMM bf16 (n, k >= 1024)", "GEMM bf16", device, tables.gemm(), ROOF)
    yield tried("GEMM fp8", "GEMM fp8", device, tables.gemm(dtype="fp8"), ROOF)
    yield tried("prefill attention", "prefill attention", device, tables.attention("prefill"), (*ROOF, 0.0))
    yield tried("decode attention", "decode attention", device, tables.attention("decode"), (TINY, 1.0, 0.0))
    for routing in ("balanced", "skewed"):
        bare = replace(device, moe={key: fit for key, fit in device.moe.items() if " " not in key})
        for shape, measured in tables.moe(routing).items():
            yield tried(f"MoE {routing}, fitted per model", shape, device, measured, (*ROOF, 1e12))
            yield tried(f"MoE {routing}, one fit for all models", shape, bare, measured, (*ROOF, 1e12))


def exchanges(device: Device, system: str = "h100_sxm") -> Iterator[Line]:
    """Collectives within a node."""
    for op, ranks, measured in tables.collectives(system):
        yield tried(OP_NAMES[op], f"{OP_NAMES[op]} n={ranks}", device, measured, (TINY, 0.0, 450e9, 0.0))


def messages(device: Device) -> Iterator[Line]:
    """Single messages, and DeepEP. A half of 13 messages says little (one that is 20 % off moves its mean by 1.5): each half in turn."""
    for between, sheet in ((False, (TINY, 0.0, 450e9, 0.0)), (True, (TINY, 50e9))):
        where = "between nodes" if between else "inside a node"
        for swap in (False, True):
            name = f"message {where}{', halves swapped' if swap else ''}"
            yield tried("point-to-point", name, device, tables.messages(between=between), sheet, swap=swap)
    for mode in ("low_latency", "normal"):
        for op in ("dispatch", "combine"):
            for nodes, measured in tables.deepep(op, mode).items():
                bandwidth = 450e9 if nodes == 1 else 50e9
                group = "DeepEP" if mode == "low_latency" else "DeepEP normal"
                yield tried(group, f"{group} {op}, {nodes} nodes", device, measured, (TINY, 0.0, bandwidth, 0.0))


def all_lines(device: Device) -> list[Line]:
    """Everything that was measured on H100."""
    lines = [*operations(device), *exchanges(device), *messages(device)]
    return sorted(lines, key=lambda line: [other.group for other in lines].index(line.group))


def pooled(lines: list[Line], group: str) -> Errors:
    """A group's rows together; the median is that of its lines."""
    found = [line.formula for line in lines if line.group == group]
    n = sum(e.n for e in found)
    return Errors(n, sum(e.n * e.mape for e in found) / n, median(e.median for e in found))


def grid_errors(cluster: Cluster) -> tuple[Errors, Errors, Errors, Errors]:
    """(TTFT, TPOT) of the static grid, then both of the rows that nothing was fitted to."""
    rows = static_grid(cluster)
    found = []
    for part in (rows, rows[1::2]):
        found.append(errors([r.our_ttft_s for r in part], [r.ttft_s for r in part]))
        found.append(errors([r.our_tpot_s for r in part], [r.tpot_s for r in part]))
    ttft, tpot, held_ttft, held_tpot = found
    return ttft, tpot, held_ttft, held_tpot


@dataclass(frozen=True)
class Deployment:
    """A real server's errors at the concurrencies that nothing was fitted to, before and after calibration at the others."""

    name: str
    runs: int
    waited: int  # left out of TTFT: their first tokens waited for memory
    tpot: float
    tpot_calibrated: float
    ttft: float
    ttft_calibrated: float
    serving: Serving


def deployment(model: str, weights: str, backend: str, cluster: Cluster) -> Deployment:
    """One measured deployment on H100."""
    fitted, held = halves(runs(model, weights, cluster, backend), lambda run: run.concurrency)
    serving, bare = fit_serving(fitted), Serving()
    return Deployment(
        f"{model.rpartition('/')[2]} {weights} {backend}",
        len(held),
        len(held) - len(steady(held)),
        tpot_error(held, bare),
        tpot_error(held, serving),
        ttft_error(held, bare),
        ttft_error(held, serving),
        serving,
    )


def all_deployments(cluster: Cluster) -> list[Deployment]:
    """Every measured deployment of a dense model that the catalogue knows."""
    return [deployment(*found, cluster) for found in deployments()]


def transferred(like: Device, sheet: Device) -> dict[str, float]:
    """What to expect of a device that nobody measured: one device's constants with the A100's data sheet, on the A100's tables."""
    width = replace(like.scale_up, bandwidth=like.scale_up.bandwidth * 300 / 450)  # as the data sheets say of their links
    device = replace(sheet, gemm=like.gemm, scale_up=width, collectives={})
    family, samples = tables.gemm("a100_sxm")
    rings = [(ranks, s) for op, ranks, measured in tables.collectives("a100_sxm") if op == "all_reduce" for s in measured[1]]
    ring = errors([ring_s(width, ranks, s.size, rounds=2) for ranks, s in rings], [s.seconds for _, s in rings])
    return {"GEMM bf16": family_errors(family, device, samples).mape, "all-reduce": ring.mape}
