#!/usr/bin/env python3
"""The packed linear kernel against its limits and against torch (oneDNN), in turn in one run; bfloat16.

`python benchmarks/gemm.py [--threads 1 2] [--repetitions 7] [--int8]` prints one JSON line per figure:
`stream`: few rows, weights from memory (larger than the caches): the time beside a pure read of as many bytes, and beside one row;
`prefill`: many rows, one thread: beside the peak of a loop on registers, and beside torch's F.linear;
`small`: a tiny layer, one row, weights in the caches.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from lockstep.cli.bench import machine
from lockstep.kernels.build import compiler
from lockstep.kernels.library import DTYPE_CODES, library
from lockstep.kernels.packed import PackedLinear
from lockstep.kernels.program import Program, StepArgs

ROWS = (1, 2, 4, 8, 16, 32)
SHAPES = ((1024, 1024), (4096, 1024), (1024, 4096), (4096, 4096))
STREAMED_BYTES = 256 << 20
BF16 = DTYPE_CODES["bfloat16"]


class Limits:
    """The functions of gemm_limits.cpp."""

    def __init__(self, folder: Path) -> None:
        source, built = Path(__file__).parent / "gemm_limits.cpp", folder / "limits.so"
        subprocess.run(
            [*compiler(), "-O3", "-march=native", "-pthread", "-shared", "-fPIC", str(source), "-o", str(built)], check=True, timeout=60
        )
        self._c = ctypes.CDLL(str(built))
        self._c.limits_buffer.restype = ctypes.c_void_p
        self._c.limits_buffer.argtypes = [ctypes.c_int64]
        self._c.limits_read.restype = self._c.limits_peak.restype = ctypes.c_double
        self._c.limits_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self._buffer = self._c.limits_buffer(STREAMED_BYTES)

    def read_s(self, bytes_: int, threads: int) -> float:
        return float(self._c.limits_read(self._buffer, bytes_, threads))

    def peak(self) -> float:
        return float(self._c.limits_peak())


class Products:
    """`copies` layers of one shape, run one after the other as one step."""

    def __init__(self, lib: Any, n: int, k: int, copies: int, rows: int, int8: bool = False) -> None:
        self.x, self.out = torch.randn(rows, k).bfloat16(), torch.empty(rows, n, dtype=torch.bfloat16)
        self.weights = [torch.randn(n, k).bfloat16() for _ in range(min(copies, 2))]
        dtype = torch.int8 if int8 else torch.bfloat16
        self.packed = [PackedLinear(self.weights[i % len(self.weights)], dtype=dtype) for i in range(copies)]
        self.step, self.program = StepArgs(lib), Program(lib)
        for i, p in enumerate(self.packed):
            self.program.add(str(i), lib.op_linear(p.handle, self.x.data_ptr(), k, BF16, self.out.data_ptr(), n, BF16, 0))

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.packed)

    def run_s(self, rows: int) -> float:
        self.step.set_rows(rows)
        return seconds(lambda: self.program.run(self.step))


def seconds(do: Callable[[], object]) -> float:
    begin = time.perf_counter()
    do()
    return time.perf_counter() - begin


def in_turn(repetitions: int, *sides: Callable[[], float]) -> list[list[float]]:
    """What each side measured, by repetition; one round before that does not count."""
    rounds = [[side() for side in sides] for _ in range(repetitions + 1)][1:]
    return [list(values) for values in zip(*rounds, strict=True)]


def ratio(above: list[float], below: list[float]) -> float:
    """Median of the ratios of neighbours."""
    return round(median(a / b for a, b in zip(above, below, strict=True)), 3)


def report(**line: object) -> None:
    print(json.dumps(line), flush=True)


def stream(lib: Any, limits: Limits, threads: int, repetitions: int, int8: bool) -> None:
    """4096 x 1024 weights, 256 MiB of them in all (half as many in int8)."""
    lib.team_set(threads, 0, 0)
    layers = Products(lib, 4096, 1024, STREAMED_BYTES // (4096 * 1024 * 2), max(ROWS), int8)
    report(metric="huge_pages", asked_mib=lib.huge_used() >> 20, granted_mib=lib.huge_granted() >> 20)
    for rows in ROWS:
        product, read, one = in_turn(
            repetitions, lambda rows=rows: layers.run_s(rows), lambda: limits.read_s(layers.nbytes, threads), lambda: layers.run_s(1)
        )
        report(
            metric="stream",
            weights="int8" if int8 else "bfloat16", threads=threads, rows=rows,
            gbps=round(layers.nbytes / median(product) / 1e9, 1),
            limit_gbps=round(layers.nbytes / median(read) / 1e9, 1), of_limit=ratio(read, product), times_one_row=ratio(product, one),
        )  # fmt: skip
    lib.team_set(1, 0, 0)


def prefill(lib: Any, limits: Limits, repetitions: int) -> None:
    for n, k in SHAPES:
        layer = Products(lib, n, k, 1, 2048)
        for rows in (256, 512, 1024, 2048):
            x, w = layer.x[:rows], layer.weights[0]
            flop = 2 * rows * n * k
            product, torch_s, peak = in_turn(
                repetitions, lambda layer=layer, rows=rows: layer.run_s(rows), lambda x=x, w=w: seconds(lambda: F.linear(x, w)), limits.peak
            )
            of_peak = [flop / s / 1e9 / p for s, p in zip(product, peak, strict=True) if p]
            report(
                metric="prefill", rows=rows, n=n, k=k, gflops=round(flop / median(product) / 1e9), peak_gflops=round(median(peak)),
                of_peak=round(median(of_peak), 3) if of_peak else None, times_torch=ratio(torch_s, product),
            )  # fmt: skip


def small(lib: Any, repetitions: int) -> None:
    """Twenty products in one step: what a product costs where the call does not count."""
    for n, k in ((256, 256), (768, 256), (512, 512)):
        layers = Products(lib, n, k, 20, 1)
        took, torch_s = in_turn(
            repetitions * 5,
            lambda layers=layers: layers.run_s(1),
            lambda layers=layers: seconds(lambda: F.linear(layers.x, layers.weights[0])),
        )
        report(
            metric="small",
            rows=1,
            n=n,
            k=k,
            us=round(median(took) / 20 * 1e6, 2),
            times_torch=round(median(torch_s) * 20 / median(took), 2),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--int8", action="store_true", help="stream int8 weights too")
    args = parser.parse_args()
    lib = library()
    if lib is None:
        raise SystemExit("there are no CPU kernels here: see LOCKSTEP_KERNELS")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory(prefix="gemm-") as folder:
        limits = Limits(Path(folder))
        report(variant=lib.variant(), machine=machine.describe())
        for threads in args.threads:
            for int8 in (False, True) if args.int8 else (False,):
                stream(lib, limits, threads, args.repetitions, int8)
        prefill(lib, limits, args.repetitions)
        small(lib, args.repetitions)


if __name__ == "__main__":
    main()
