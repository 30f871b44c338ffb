"""`lockstep calibrate`: measure this machine for the planner with the engine's own kernels, ranks and steps.

Writes a catalogue entry, which `lockstep plan --cluster this` reads, and prints what it found. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lockstep.cli.bench import collectives, machine
from lockstep.cli.errors import UsageError
from lockstep.cli.parser import Parser
from lockstep.planner import calibration
from lockstep.planner.calibration import DISTURBED, Calibration, Mode
from lockstep.planner.cpu_ops import per_weight_s
from lockstep.planner.hardware import DTYPE_BYTES
from lockstep.utils.cores import usable_cores
from lockstep.utils.host_memory import host_available_bytes
from lockstep.utils.interrupt import terminable
from lockstep.utils.sizes import size

SIZES = (256, 2048, 16384, 131072, 1048576, 8388608)
COLLECTIVES_S = 3.0
BUDGET_S = 56.0
LEAST_S = 40.0  # processes started, models made, their longest steps, and a round
END_S = 2.5  # ranks that go, and the fits
ROOM = 5 << 30  # bytes for the models, which three ranks keep, and four engines, in two bytes a weight
CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
USUAL_CACHE = 32 << 20


def run(argv: list[str]) -> int:
    """Measure, write, print. Raises UsageError for an impossible flag, ConfigError where there are no kernels for this machine."""
    parser = Parser(prog="lockstep calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="the entry's file; default: where `--cluster this` finds it")
    parser.add_argument("--budget-seconds", type=float, default=BUDGET_S, help="about how long it may take in all")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of weights and activations")
    args = parser.parse_args(argv)
    if not LEAST_S <= args.budget_seconds < math.inf:
        raise UsageError(f"--budget-seconds={args.budget_seconds:g} must be a number of seconds, at least {LEAST_S:g}.")
    path = args.out or calibration.path_of()
    _check_out(path, named=args.out is not None)
    with terminable():
        found = calibrate(args.budget_seconds, args.dtype)
    calibration.save(found, path)
    print(table(found))
    print(f"\nwritten to {path} ({found.seconds:.0f} s)")
    return 0


def _check_out(path: Path, *, named: bool) -> None:
    """Raises UsageError, before anything is measured, where the entry could not be written. named: by the user."""
    what = f"--out={path}" if named else f"{path}, where entries are kept,"
    try:
        if not named:
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not path.parent.is_dir():
            place = "is a folder" if path.is_dir() else "is in a folder that is not there"
            raise UsageError(f"{what} {place}: name a file to write.")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as e:
        raise UsageError(f"{what} cannot be written ({e.strerror}): name a file to write{'' if named else ' with --out'}.") from None


def calibrate(seconds: float, dtype: str = "bfloat16") -> Calibration:
    """This machine, measured in about so many seconds."""
    from lockstep.cli.calibrate_engine import whole_engines
    from lockstep.kernels.library import library
    from lockstep.simulation.calibrate import machine_modes, with_messages
    from lockstep.simulation.measure import MODELS

    if (kernels := library()) is None:  # compiled on first use, which is not part of the budget
        raise UsageError("`lockstep calibrate` measures the CPU kernels, and there are none here: `lockstep doctor` says why.")
    begun, free, need = time.monotonic(), host_available_bytes(), ROOM * int(DTYPE_BYTES[dtype]) // 2
    if free < need:
        raise UsageError(f"`lockstep calibrate` takes about {size(need)} for its models, and {size(free)} are free: stop other programs.")
    cores = len(usable_cores())
    sums, exchanges = _exchanges()
    left = seconds - (time.monotonic() - begun) - END_S
    found = machine_modes(left, lambda ranks: whole_engines(ranks, dtype, MODELS[2]), _say, last_cache_bytes(), dtype)
    modes = [with_messages(mode, sums, exchanges, int(DTYPE_BYTES[dtype])) for mode in found]
    about = machine.describe()
    return Calibration(
        name="this",
        machine=f"{about['cpu']}, {cores} cores, torch {about['torch']}",
        cores=cores,
        kernels=str(kernels.variant()),
        dtype=dtype,
        capacity_bytes=free,
        memory_bandwidth=modes[0].bandwidth,
        cache_bytes=last_cache_bytes(),
        flops={dtype: peak_flops(modes)},
        all_reduce=sums,
        send_recv=exchanges,
        modes=modes,
        seconds=round(time.monotonic() - begun, 1),
    )


def peak_flops(modes: list[Mode]) -> float:
    """The best rate of any measured product, all ranks together."""
    return max(2 * p.rows / work * m.busy for m in modes for p in m.products for _, work in p.work if work > 0)


def last_cache_bytes() -> int:
    """Of the last level of this machine's caches; a usual size where the system does not say."""
    sizes = []
    for file in CACHE.glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]] if text[-1] in "KM" else int(text))
    return max(sizes, default=USUAL_CACHE)


def _exchanges() -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(bytes, seconds) of all-reduce and of send and receive between two ranks."""
    _say("2 ranks: all-reduce, send and receive ...")
    args = collectives.CollectivesArgs(
        ops="all_reduce,send_recv", sizes=",".join(map(str, SIZES)), dtypes="bfloat16", communicators="shm", budget_seconds=COLLECTIVES_S
    )
    found: dict[str, list[tuple[int, float]]] = {"all_reduce": [], "send_recv": []}
    for line in collectives.measure(args.plan()):
        found[line["op"]].append((int(line["bytes"]), line["median_us"] * 1e-6))
    return found["all_reduce"], found["send_recv"]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(found: Calibration) -> str:
    """The entry for people."""
    lines = [
        f"{found.machine}; kernels {found.kernels}",
        f"memory {found.memory_bandwidth / 1e9:.1f} GB/s, {found.dtype} {found.flops[found.dtype] / 1e9:.0f} GFLOP/s at best",
        "",
        f"{'bytes':>9}  {'all-reduce us':>13}  {'send and receive us':>19}",
    ]
    both = zip(found.all_reduce, found.send_recv, strict=False)
    lines += [f"{size:>9}  {sums * 1e6:>13.1f}  {exchange * 1e6:>19.1f}" for (size, sums), (_, exchange) in both]
    for mode in found.modes:
        busy = f", {mode.busy} at work" if mode.busy != mode.ranks else ""
        lines += ["", f"{mode.ranks} rank(s) of {mode.threads} thread(s){busy}: a rank reads {mode.bandwidth / 1e9:.1f} GB/s"]
        step = f"{_line(mode.step)} a request ({_line(mode.step_far)} where the model fills the caches)"
        engine = f"{step}, {mode.prompt_s * 1e6:.0f} us a prompt, {mode.prompt_token_s * 1e6:.2f} us a token of it"
        lines += [f"  step {engine}", _products(mode)]
        if mode.disturbed > DISTURBED:
            lines.append(f"  x{mode.disturbed:.2f} as long in the usual round as in the quicker ones: something else uses it, or its host")
        for kind, (constants, samples) in mode.tried.items():
            kept = "samples kept" if kind in mode.samples else "constants alone"
            lines.append(f"  {kind}: held-out error {constants:.1%} by constants, {samples:.1%} by other samples too; {kept}")
        if mode.combine.base_s or mode.combine.per_s:
            lines.append(f"  sum over the ranks {_line(mode.combine, 1e9)} a 1000 values")
    return "\n".join(lines)


def _line(line: Any, scale: float = 1e6) -> str:
    return f"{line.base_s * 1e6:.1f} us + {line.per_s * scale:.2f} us"


def _products(mode: Mode) -> str:
    head = "  rows   GFLOP/s (weights in the caches)   GB/s (weights from memory)"
    rows = [head]
    for p in mode.products:
        small, large = p.work[0][1], per_weight_s(p, p.work[-1][0])
        rows.append(f"  {p.rows:>4}   {_rate(2 * p.rows, small):>9.0f}   {_rate(2, large):>28.1f}")
    return "\n".join(rows)


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds / 1e9 if seconds else float("inf")
