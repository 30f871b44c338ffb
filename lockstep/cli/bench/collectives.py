"""`lockstep bench collectives --world-size N`: what ranks on this machine need to talk, by operation, size and communicator.

Every call is the public one (`GroupCoordinator`), in place where there is such a form; for all_reduce the communicator's own
method is timed too, and the difference shown. Communicators take turns within each size. memcpy is one copy of as many bytes
by every rank at once: no collective can be faster, and a sum must read and write more than that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lockstep.cli.errors import UsageError
from lockstep.config.tree import opt

OPS = ("all_reduce", "all_gather", "reduce_scatter", "gather", "broadcast", "all_to_all", "send_recv", "barrier")
DTYPES = ("bfloat16", "float32")
COMMUNICATORS = ("shm", "hierarchical", "gloo")
LIMIT_S = 600.0


@dataclass(frozen=True)
class CollectivesArgs:
    """What to run."""

    world_size: int = opt(2, "Ranks, all on this machine.")
    ops: str = opt(",".join(OPS), "Operations, separated by commas.")
    sizes: str = opt("256,2048,8192,65536,262144,1048576,4194304,16777216", "Bytes: of a rank's input or output, whichever is larger.")
    dtypes: str = opt(",".join(DTYPES), "Types of the values, separated by commas.")
    communicators: str = opt(",".join(COMMUNICATORS), "Of shm, hierarchical, gloo; one that cannot be had here is left out.")
    budget_seconds: float = opt(35.0, "About how long the measurement may take in all.")
    json: bool = opt(False, "Print one JSON line per result on standard output.")

    def plan(self) -> dict[str, Any]:
        """The checked choice, as ranks get it. Raises UsageError."""
        if not 1 < self.world_size <= 64:
            raise UsageError(f"--world-size={self.world_size} is invalid: it must be from 2 to 64.")
        if not 0 < self.budget_seconds < math.inf:
            raise UsageError(f"--budget-seconds={self.budget_seconds} is invalid: it must be a number of seconds above 0.")
        try:
            sizes = [int(size) for size in self.sizes.split(",")]
        except ValueError:
            sizes = [0]
        if any(size < 1 or size > 1 << 30 for size in sizes):
            raise UsageError(f"--sizes={self.sizes} is invalid: give bytes from 1 to {1 << 30}, separated by commas.")
        chosen = {
            name: _of(name, getattr(self, name), known)
            for name, known in (("ops", OPS), ("dtypes", DTYPES), ("communicators", COMMUNICATORS))
        }
        return {**chosen, "sizes": sizes, "world_size": self.world_size, "budget_s": self.budget_seconds}


def _of(name: str, value: str, known: tuple[str, ...]) -> list[str]:
    chosen = value.split(",")
    for word in chosen:
        if word not in known:
            raise UsageError(f"--{name}={value} is invalid: {word!r} is not one of {', '.join(known)}.")
    return chosen


def collectives(args: CollectivesArgs) -> int:
    """Run the ranks and print what they find. Exit code 0, or 1 when a rank failed."""
    table = _Table()
    for line in measure(args.plan()):
        if args.json:
            print(json.dumps(line), flush=True)
        else:
            table.add(line)
    return 0


def measure(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rank 0's results as they come. Raises RuntimeError with the last line that a failing rank wrote."""
    from lockstep.utils.net import Listener

    listener = Listener()
    death_read, death_write = os.pipe()
    ranks: list[subprocess.Popen[str]] = []
    try:
        for rank in range(plan["world_size"]):
            spec = {**plan, "rank": rank, "port": listener.port, "fd": listener.fileno() if rank == 0 else -1}
            spec |= {"parent": os.getpid(), "death_fd": death_read}
            fds = [death_read, *([listener.fileno()] if rank == 0 else [])]
            command = [sys.executable, "-m", "lockstep.cli.bench.collectives_rank", json.dumps(spec)]
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
            ranks.append(subprocess.Popen(command, pass_fds=fds, **pipes))
        listener.close()
        said = [_collect(rank) for rank in ranks]
        timer = threading.Timer(LIMIT_S, lambda: [rank.kill() for rank in ranks])
        timer.start()
        try:
            out = ranks[0].stdout
            assert out is not None
            yield from (json.loads(line) for line in out)
            codes = [rank.wait() for rank in ranks]
        finally:
            timer.cancel()
        for rank, code in enumerate(codes):
            if code:
                last = [line for line in said[rank] if line.strip()][-1:] or [f"exit code {code}"]
                raise RuntimeError(f"rank {rank} of {plan['world_size']} failed: {last[0].strip()}")
    finally:
        os.close(death_write)
        os.close(death_read)
        for process in ranks:
            with contextlib.suppress(OSError):
                process.kill()
            process.wait()


def _collect(rank: subprocess.Popen[str]) -> list[str]:
    """What the rank writes to its error output, as it comes: a full pipe would stop it."""
    lines: list[str] = []
    source = rank.stderr
    assert source is not None

    def collect() -> None:
        for line in source:
            lines.append(line)
            if "is left out:" in line:
                print(line, end="", file=sys.stderr, flush=True)

    threading.Thread(target=collect, daemon=True).start()
    return lines


class _Table:
    """Prints results as rows, a heading for each operation and dtype."""

    def __init__(self) -> None:
        self._heading = ""

    def add(self, line: dict[str, Any]) -> None:
        heading = f"{line['op']} {line['dtype']}, {line['world_size']} ranks"
        if heading != self._heading:
            print(f"\n{heading}\n{'bytes':>10}  {'communicator':<13} {'median us':>10} {'p99 us':>10} {'busbw GB/s':>11}  {'memcpy us':>9}")
            self._heading = heading
        more = "" if line.get("overhead_us") is None else f"  the public call adds {line['overhead_us']:.2f} us to {line['bare_us']:.2f}"
        if (line.get("overhead_us") or 0) < 0:
            more = f"  the public call adds less to {line['bare_us']:.2f} us than calls differ by"
        copy = "" if line["memcpy_us"] is None else f"{line['memcpy_us']:.2f}"
        numbers = f"{line['median_us']:>10.2f} {line['p99_us']:>10.2f} {line['busbw_GBps']:>11.3f}  {copy:>9}"
        print(f"{line['bytes']:>10}  {line['communicator']:<13} {numbers}{more}", flush=True)


def run(argv: list[str]) -> int:
    """Parse the flags and measure."""
    import tyro

    from lockstep.cli.flags import options_form

    form = options_form(CollectivesArgs)
    found: Any = tyro.cli(form, prog="lockstep bench collectives", args=argv, description=__doc__)
    return collectives(CollectivesArgs(**{f.name: getattr(found, f.name) for f in dataclasses.fields(CollectivesArgs)}))
