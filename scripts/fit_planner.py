#!/usr/bin/env python3
"""Write lockstep/planner/data/devices.json: data sheets plus constants fitted to the tables in tests/planner/data, and beside it
`samples/`, the tables themselves.

    python scripts/fit_planner.py [--check]

Constants are fitted to every other size of each table; tests/planner/test_accuracy.py tries them on the others. All samples of a table
are shipped where interpolating one half of them predicts the other better than the formula does, both ways round together.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lockstep.planner import families, samples  # noqa: E402
from lockstep.planner.catalogue import SHIPPED  # noqa: E402
from lockstep.planner.entry import from_entry  # noqa: E402
from lockstep.planner.fit import errors, halves, minimise  # noqa: E402
from lockstep.planner.hardware import Device, Link, Roofline, make_cluster  # noqa: E402
from lockstep.testing import planner_tables as tables  # noqa: E402
from lockstep.testing.planner_runs import static_grid  # noqa: E402

ROUNDS = 400
# name here: (row of hardware.csv, aliases, cores that share the work, bytes that nvidia-smi reports where known)
SHEET: dict[str, tuple[str, tuple[str, ...], int, int | None]] = {
    "H100": ("H100-SXM5-80GB", ("H100-SXM", "H100-SXM5", "H100-SXM5-80GB"), 132, 81559 << 20),
    "H100-PCIE": ("H100-PCIe-80GB", ("H100-PCIE-80GB",), 114, None),
    "H200": ("H200-SXM-141GB", ("H200-SXM", "H200-SXM-141GB"), 132, 143771 << 20),
    "B200": ("B200-SXM", ("B200-SXM",), 148, None),
    "B300": ("B300-SXM", ("B300-SXM",), 148, None),
    "GB200": ("GB200-NVL72", ("GB200-NVL72",), 148, None),
    "GB300": ("GB300-NVL72", ("GB300-NVL72",), 148, None),
    "A100": ("A100-SXM4-80GB", ("A100-SXM", "A100-80GB", "A100-SXM4-80GB"), 108, 81920 << 20),
    "A100-PCIE": ("A100-PCIe-80GB", ("A100-PCIE-80GB",), 108, None),
    "L40S": ("L40S", (), 142, 46068 << 20),
    "MI300X": ("MI300X", (), 304, None),
    "TPU-V5E": ("TPU-v5e", ("V5E",), 4, None),
}
PLATFORMS = {"MI300X": "rocm", "TPU-V5E": "tpu"}  # others are cuda
MEASURED = {"H100": "h100_sxm", "A100": "a100_sxm", "L40S": "l40s", "GB200": "gb200", "GB300": "gb300"}
OPS_BAND = {"operation": 0.10, "tpot": 0.20, "ttft": 0.50}  # of a device whose operations were measured, engine uncalibrated
TABLES = "aiconfigurator-core 0.12.0 op tables (Apache-2.0); messages: microsoft/vidur data/profiling/network (MIT)"


def fitted(device: Device, measured: tables.Measured) -> Device:
    """The device with one family fitted to every other size."""
    family, samples = measured
    return families.fit_family(family, device, halves(samples, lambda s: s.size)[0], ROUNDS)


def kernels() -> Iterator[tables.Measured]:
    """What was measured of kernels and between nodes on H100; a model's own experts after those of all models, which they would hide."""
    yield from (tables.gemm(), tables.gemm(dtype="fp8"), tables.attention("prefill"), tables.attention("decode"))
    for routing in ("balanced", "skewed"):
        yield from tables.moe(routing).values()
    yield from (tables.messages(), tables.messages(between=True))
    for mode in ("low_latency", "normal"):
        for op in ("dispatch", "combine"):
            yield from tables.deepep(op, mode).values()


def h100(device: Device) -> Device:
    """All constants that H100s were measured for, but those of small kernels."""
    for routing in ("balanced", "skewed"):
        shapes = tables.moe(routing).values()
        device = fitted(device, (families.moe(routing), [s for _, found in shapes for s in found]))
    for measured in kernels():
        device = fitted(device, measured)
    return device


def sampled(device: Device, measured: Iterable[tables.Measured]) -> Device:
    """The device with the samples of what was measured, and how far off both methods are on samples they have not seen."""
    every = {family.name: (family, found) for family, found in measured}
    tried = {name: families.both_ways(family, device, found) for name, (family, found) in every.items()}
    rows = {name: samples.rows_of(found) for name, (_, found) in every.items() if tried[name].table is not None}
    return samples.attached(replace(device, samples=rows, tried=tried))


def small_kernels(device: Device) -> Device:
    """Norms, rope and activation were not measured alone: their two constants are what every other row of the grid leaves over."""

    def loss(c: Sequence[float]) -> float:
        tried = replace(device, elementwise=Roofline(c[0], 1.0, c[1]))
        rows = static_grid(make_cluster(tried))[::2]
        ttft = errors([r.our_ttft_s for r in rows], [r.ttft_s for r in rows])
        return ttft.mape + errors([r.our_tpot_s for r in rows], [r.tpot_s for r in rows]).mape

    launch_s, efficiency = minimise(loss, (3e-6, 0.7), 60)
    return replace(device, elementwise=Roofline(launch_s, 1.0, efficiency))


def links(device: Device, system: str) -> Device:
    """What was measured between devices of a node; a bare link for the rank counts that nobody measured."""
    ring: list[families.Sample] = []
    for op, ranks, measured in tables.collectives(system):
        device = fitted(device, measured)
        if op == "all_reduce":
            ring += [families.Sample(s.size, (ranks, *s.args), s.seconds) for s in measured[1]]
    return fitted(device, (families.ring(), ring)) if ring else device


def sheet() -> dict[str, dict[str, Any]]:
    """Entries from the data sheets alone."""
    with (tables.DATA / "hardware.csv").open(encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    return {name: bare_entry(name, rows[row], aliases, cores, seen) for name, (row, aliases, cores, seen) in SHEET.items()}


def bare_entry(name: str, row: dict[str, str], aliases: tuple[str, ...], cores: int, seen: int | None) -> dict[str, Any]:
    """One device by its data sheet: links of the width that it says, with the latencies of the H100's."""
    columns = {"bfloat16": "bf16_dense_flops", "fp8": "fp8_dense_flops", "fp4": "fp4_dense_flops"}
    flops = {dtype: float(row[column]) for dtype, column in columns.items() if row[column]}
    if "fp8" in flops:
        flops["int8"] = flops["fp8"]
    return {
        "name": name,
        "aliases": list(aliases),
        "flops": flops,
        "memory_bandwidth": float(row["mem_bw_Bps"]),
        "capacity_bytes": seen or int(float(row["mem_bytes_nominal"])),
        "scale_up": {"bandwidth": float(row["scaleup_bw_Bps_per_dir"] or 45e9), "latency_s": 5e-6},
        "scale_out": {"bandwidth": float(row["scaleout_bw_Bps_per_gpu"] or 50e9), "latency_s": 18e-6},
        "per_node": int(row["gpus_per_node"] or 1),
        **({"platform": PLATFORMS[name]} if name in PLATFORMS else {}),
        "cores": cores,
        "like": "" if name == "H100" else "H100",
        "source": row["source"],
    }


def rounded(value: Any) -> Any:
    """Five digits: more would only be the search's last steps."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {str(key): rounded(found) for key, found in value.items()}
    return value


def catalogue() -> dict[str, Any]:
    """The whole file."""
    entries = sheet()
    known: dict[str, Device] = {}
    for name, entry in entries.items():
        device = from_entry(entry, known.__getitem__)
        before = device
        measured: list[tables.Measured] = []
        if name in MEASURED:
            device = links(device, MEASURED[name])
            measured = [found for _, _, found in tables.collectives(MEASURED[name])]
        if name == "H100":
            device = h100(device)
            measured += kernels()
        elif name == "A100":
            measured.append(tables.gemm("a100_sxm"))
            device = fitted(device, measured[-1])
        device = sampled(device, measured)
        if name == "H100":
            device = small_kernels(device)
        known[name] = device
        write_fits(entry, before, device)
        if name != "H100":
            scale_links(entry, known["H100"], ("scale_out",) if name in MEASURED else ("scale_up", "scale_out"))
    entries["H100"]["band"] = entries["A100"]["band"] = OPS_BAND
    made = [*entries.values(), vidur(entries["A100"]), cpu()]
    return {"made_by": "scripts/fit_planner.py", "fitted_to": TABLES, "devices": made}


def write_fits(entry: dict[str, Any], before: Device, device: Device) -> None:
    """The constants that fitting moved, into the entry."""
    fits: dict[str, Any] = {}
    for key in ("gemm", "moe"):
        now, was = getattr(device, key), getattr(before, key)
        changed = {name: asdict(now[name]) for name in now if now[name] is not was.get(name)}
        fits |= {key: changed} if changed else {}
    for key in ("prefill", "decode", "elementwise"):
        if getattr(device, key) is not getattr(before, key):
            fits[key] = asdict(getattr(device, key))
    if device.collectives:
        fits["collectives"] = {op: {n: asdict(link) for n, link in found.items()} for op, found in device.collectives.items()}
    for key in ("scale_up", "scale_out"):
        if getattr(device, key) is not getattr(before, key):
            entry[key] = rounded(asdict(getattr(device, key)))
    if device.tried:
        entry["tried"] = {family: {"formula": found.formula, "table": found.table} for family, found in device.tried.items()}
    if device.samples:
        entry["samples"] = device.samples  # `main` packs them
    if fits:
        entry["fits"] = rounded(fits)
        entry["calibrated"] = entry["name"] in ("H100", "A100")


def scale_links(entry: dict[str, Any], like: Device, keys: Sequence[str]) -> None:
    """Links of a device that nobody measured: those of the H100 in proportion to the data sheets' widths."""
    wide = "scale_up" in keys and entry["scale_up"]["bandwidth"] >= 450e9  # the same switched fabric, or a wider one of its kind
    for key in keys:
        nominal = {"scale_up": 450e9, "scale_out": 50e9}[key]
        link: Link = getattr(like, key)
        share = entry[key]["bandwidth"] / nominal
        entry[key] = rounded(asdict(replace(link, bandwidth=link.bandwidth * share)))
        if wide:
            scaled = {
                op: {n: asdict(replace(found, bandwidth=found.bandwidth * share)) for n, found in by_ranks.items()}
                for op, by_ranks in like.collectives.items()
                if op.startswith("deepep") == (key == "scale_out")
            }
            entry.setdefault("fits", {}).setdefault("collectives", {}).update(rounded(scaled))


def vidur(a100: dict[str, Any]) -> dict[str, Any]:
    """The A100 machines of vidur's tables: two nodes on a slow fabric, the reference for what crossing nodes costs."""
    slow = fitted(from_entry(a100, lambda _: Device("", {}, 1, 1, Link(0, 0, 1), Link(0, 0, 1))), tables.messages("a100_dgx", True))
    entry = {**a100, "name": "A100-VIDUR", "aliases": [], "scale_out": rounded(asdict(slow.scale_out))}
    return entry | {"source": "A100, with the fabric between nodes of microsoft/vidur data/profiling/network (MIT)"}


def cpu() -> dict[str, Any]:
    """One core of the machine whose measurements are shipped; `lockstep calibrate` puts this machine in its place."""
    raw = json.loads((tables.DATA / "cpu_calibration_2core.json").read_text(encoding="utf-8"))
    entry: dict[str, Any] = {
        "name": "CPU",
        "flops": {"bfloat16": 1.572e12, "float32": 1.2e11},
        "memory_bandwidth": 1.5e10,
        "capacity_bytes": 16 << 30,
        "scale_up": {"bandwidth": 3.85e9, "latency_s": 79e-6},
        "per_node": 1,
        "platform": "cpu",
        "cores": 1,
        "source": f"{raw['machine']}; run `lockstep calibrate` for this one",
    }
    device = from_entry(entry, lambda _: Device("", {}, 1, 1, Link(0, 0, 1), Link(0, 0, 1)))
    before = device
    for measured in tables.cpu():
        device = fitted(device, measured)
    device = sampled(device, tables.cpu())
    write_fits(entry, before, device)
    return entry


def files() -> dict[Path, bytes]:
    """What is shipped, by path: the catalogue, and a packed file for each device with samples of its own."""
    found, names = catalogue(), dict[bytes, str]()
    for entry in found["devices"]:
        if isinstance(rows := entry.get("samples"), dict):
            entry["samples"] = names.setdefault(samples.packed(rows), f"{entry['name'].lower()}.json.gz")
    return {SHIPPED: (json.dumps(found, indent=1) + "\n").encode(), **{samples.FOLDER / name: data for data, name in names.items()}}


def is_shipped(path: Path, data: bytes) -> bool:
    """Whether a file says what `data` says. Packed ones are compared by their rows: another build of zlib packs these otherwise."""
    if not path.exists():
        return False
    there = path.read_bytes()
    return samples.unpacked(there) == samples.unpacked(data) if path.suffix == ".gz" else there == data


def main() -> int:
    """Write the files; with --check, only say whether they are what the tables give (exit 1 when not)."""
    made = files()
    if "--check" in sys.argv:
        return 0 if all(is_shipped(path, data) for path, data in made.items()) else 1
    samples.FOLDER.mkdir(exist_ok=True)
    for path, data in made.items():
        path.write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
