"""Every accuracy that the planner claims, computed: held-out halves of the tables, the static grid, real servers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import median

from lockstep.planner.collectives import ring_s
from lockstep.planner.families import HeldOut, family_errors, fit_family, held_out, moe
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
    """A family's errors on one half of its sizes by constants and samples of the other: `ways` are the even sizes for the odd ones,
    and the reverse. sheet: data sheet alone, on the odd ones. by_table: what `lockstep plan` prices it by, with all samples."""

    group: str
    name: str
    ways: tuple[HeldOut, HeldOut]
    sheet: Errors
    by_table: bool

    @property
    def used(self) -> list[Errors]:
        """Both ways, by the method that prices it."""
        return [way.table if self.by_table else way.formula for way in self.ways]


def tried(group: str, name: str, device: Device, measured: tables.Measured, sheet: tuple[float, ...], other: Device | None = None) -> Line:
    """The device's committed constants on the half that they were not fitted to; and constants fitted to that half, those of `other`
    or else of this family alone, on the other one."""
    family, samples = measured
    kept = device.tried.get(family.name)
    bare = replace(device, tables={}, tried={})
    ways = held_out(family, bare, samples, fit=False), held_out(family, other or bare, samples, swap=True, fit=other is None)
    odd = halves(samples, lambda s: s.size)[1]
    return Line(group, name, ways, family_errors(family, family.put(bare, sheet), odd), bool(kept and kept.table is not None))


def operations(device: Device) -> Iterator[Line]:
    """Kernels on H100."""
    yield tried("GEMM bf16 (n, k >= 1024)", "GEMM bf16", device, tables.gemm(), ROOF)
    yield tried("GEMM fp8", "GEMM fp8", device, tables.gemm(dtype="fp8"), ROOF)
    yield tried("prefill attention", "prefill attention", device, tables.attention("prefill"), (*ROOF, 0.0))
    yield tried("decode attention", "decode attention", device, tables.attention("decode"), (TINY, 1.0, 0.0))
    for routing in ("balanced", "skewed"):
        bare = replace(device, moe={key: fit for key, fit in device.moe.items() if " " not in key})
        every = [sample for _, samples in tables.moe(routing).values() for sample in samples]
        swapped = fit_family(moe(routing), replace(bare, tables={}), halves(every, lambda s: s.size)[1])
        for shape, measured in tables.moe(routing).items():
            yield tried(f"MoE {routing}, fitted per model", shape, device, measured, (*ROOF, 1e12))
            yield tried(f"MoE {routing}, one fit for all models", shape, bare, measured, (*ROOF, 1e12), swapped)


def exchanges(device: Device, system: str = "h100_sxm") -> Iterator[Line]:
    """Collectives within a node."""
    for op, ranks, measured in tables.collectives(system):
        yield tried(OP_NAMES[op], f"{OP_NAMES[op]} n={ranks}", device, measured, (TINY, 0.0, 450e9, 0.0))


def messages(device: Device) -> Iterator[Line]:
    """Single messages, and DeepEP."""
    for between, sheet in ((False, (TINY, 0.0, 450e9, 0.0)), (True, (TINY, 50e9))):
        name = f"message {'between nodes' if between else 'inside a node'}"
        yield tried("point-to-point", name, device, tables.messages(between=between), sheet)
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


def pooled(found: Iterable[Errors]) -> Errors:
    """The rows of several together; the median is that of theirs."""
    every = list(found)
    n = sum(e.n for e in every)
    return Errors(n, sum(e.n * e.mape for e in every) / n, median(e.median for e in every))


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
    device = replace(sheet, gemm=like.gemm, scale_up=width, collectives={}, tables={}, tried={})
    family, samples = tables.gemm("a100_sxm")
    rings = [(ranks, s) for op, ranks, measured in tables.collectives("a100_sxm") if op == "all_reduce" for s in measured[1]]
    ring = errors([ring_s(width, ranks, s.size, rounds=2) for ranks, s in rings], [s.seconds for _, s in rings])
    return {"GEMM bf16": family_errors(family, device, samples).mape, "all-reduce": ring.mape}
