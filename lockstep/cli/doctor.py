"""`lockstep doctor`: what this machine has, and whether ranks can talk on it.

Every check is one line: ok, a warning with what to do, or a failure with the error. Exits 1 when a check failed.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from lockstep.cli import doctor_cpu
from lockstep.cli.doctor_cpu import Check
from lockstep.version import __version__

RANK_FLAGS = ("--tensor-parallel-size", "-tp", "--world-size")
PAIR = """
import os, sys, time
import torch
from datetime import timedelta
from lockstep.distributed import rendezvous
from lockstep.distributed.parallel_state import cleanup_dist_env_and_memory, get_tp_group, initialize_model_parallel
rank, world, port, fd = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
rendezvous.join(rank, world, rank, "127.0.0.1", port, fd if rank == 0 else None, "gloo", 60.0)
initialize_model_parallel(world)
group = get_tp_group()
x = torch.full((2048,), float(rank + 1))
want = float(sum(range(1, world + 1)))
group.all_reduce(x)
times = []
for _ in range(50):
    start = time.perf_counter()
    y = group.all_reduce(x)
    times.append(time.perf_counter() - start)
assert bool((y == want).all()), "wrong sum"
if rank == 0:
    used = group.communicator
    why = getattr(used, "explanation", "")
    print(f"{sorted(times)[25] * 1e6:.0f} us ({type(used).__name__.removesuffix('Communicator').lower()}{why and ': ' + why})", flush=True)
group.barrier()
cleanup_dist_env_and_memory()
os._exit(0)  # as workers leave: the library's own tear-down can abort a process that has done its work
"""


def run(argv: list[str]) -> int:
    """Print the checks; 0 when none failed. `-tp N` asks how many ranks to plan for and to try (default 2)."""
    if "-h" in argv or "--help" in argv:
        print(__doc__)
        print("usage: lockstep doctor [--tensor-parallel-size N]")
        return 0
    world = _world_size(argv)
    failed = False
    for mark, subject, found in checks(world):
        failed |= mark == "fail"
        print(f"{mark:4}  {subject:<14}  {found}", flush=True)
    return 1 if failed else 0


def _world_size(argv: list[str]) -> int:
    if not argv:
        return 2
    if len(argv) == 2 and argv[0] in RANK_FLAGS and argv[1].isdigit() and 1 <= int(argv[1]) <= 64:
        return int(argv[1])
    print(f"error: doctor takes only {RANK_FLAGS[0]} N with N from 1 to 64, not {' '.join(argv)!r}.", file=sys.stderr)
    raise SystemExit(2)


def checks(world: int) -> Iterator[Check]:
    """All checks, in the order they are worth reading."""
    yield from _python()
    yield from _packages()
    parts: dict[str, Callable[[], Iterator[Check]]] = {
        "cores": doctor_cpu.cores,
        "threads": lambda: doctor_cpu.threads(world),
        "kernels": doctor_cpu.kernels,
        "memory": _memory,
        "huge pages": doctor_cpu.huge_pages,
        "shared memory": _shared_memory,
        "gpu": _devices,
        "demo model": _demo_model,
        "ranks": lambda: _ranks(world),
    }
    for subject, check in parts.items():
        yield from _guarded(subject, check)


def _guarded(subject: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """A check that breaks is a failed check, never a traceback."""
    try:
        yield from check()
    except Exception as e:
        yield "fail", subject, f"{type(e).__name__}: {e}"


def _python() -> Iterator[Check]:
    found = f"{platform.python_version()} on {platform.platform(terse=True)}"
    yield ("ok" if sys.version_info >= (3, 11) else "fail"), "python", found


def _packages() -> Iterator[Check]:
    yield "ok", "lockstep", __version__
    for name in ("torch", "transformers", "tokenizers", "safetensors", "msgspec"):
        try:
            yield "ok", name, version(name)
        except PackageNotFoundError:
            yield "fail", name, f"not installed: pip install {name}"


def _memory() -> Iterator[Check]:
    m = psutil.virtual_memory()
    yield ("ok" if m.available > 2**30 else "warn"), "memory", f"{m.available / 2**30:.1f} of {m.total / 2**30:.1f} GiB free"


def _shared_memory() -> Iterator[Check]:
    path = Path("/dev/shm")
    if not path.is_dir():
        yield "warn", "shared memory", "no /dev/shm: ranks on one host need it; mount a tmpfs there"
        return
    free = shutil.disk_usage(path).free
    mark = "ok" if free > 64 * 2**20 else "warn"
    yield (
        mark,
        "shared memory",
        f"{free / 2**20:.0f} MiB free in /dev/shm" + ("" if mark == "ok" else ": start the container with --shm-size=1g"),
    )


def _devices() -> Iterator[Check]:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        yield "ok", "gpu", "none: --device auto means cpu"
        return
    query = [smi, "--query-gpu=index,name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, check=False, capture_output=True, text=True, timeout=30)
    for line in done.stdout.strip().splitlines() or [done.stderr.strip() or "nvidia-smi printed nothing"]:
        yield ("ok" if done.returncode == 0 else "fail"), "gpu", line


def _demo_model() -> Iterator[Check]:
    from lockstep.config.tree import EngineConfig
    from lockstep.config.validate import resolve

    _, spec, folder = resolve(EngineConfig())
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    yield "ok", "demo model", f"{spec.architecture}, {spec.num_layers} layers, {spec.num_heads} heads, {size / 2**20:.1f} MiB"


def _ranks(world: int) -> Iterator[Check]:
    """Start `world` processes that meet over loopback and sum a tensor; the failure names the first that did not."""
    from lockstep.utils.net import Listener

    listener, start = Listener(), time.monotonic()
    procs = [
        subprocess.Popen(
            [sys.executable, "-c", PAIR, str(r), str(world), str(listener.port), str(listener.fileno())],
            pass_fds=[listener.fileno()] if r == 0 else [],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(world)
    ]
    listener.close()
    try:
        outs = [p.communicate(timeout=90) for p in procs]
    except subprocess.TimeoutExpired:
        yield "fail", "ranks", f"{world} ranks did not meet on loopback within 90 s: check that a firewall does not block 127.0.0.1"
        return
    finally:
        for p in procs:
            p.kill()
    for rank, (p, (_, err)) in enumerate(zip(procs, outs, strict=True)):
        if p.returncode:
            yield "fail", "ranks", f"rank {rank} of {world} failed: {err.strip().splitlines()[-1] if err.strip() else p.returncode}"
            return
    yield "ok", "ranks", f"{world} ranks met in {time.monotonic() - start:.1f} s; all-reduce of 8 KiB in {outs[0][0].strip()}"
