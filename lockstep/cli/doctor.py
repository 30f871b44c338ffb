"""`lockstep doctor`: what this machine has, and whether ranks can talk on it.

Every check is one line: ok, a warning with what to do, or a failure with the error. Exits 1 when a check failed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path

import psutil

from lockstep.config.tree import ParallelConfig
from lockstep.executor.affinity import plan_here
from lockstep.kernels.variants import cpu_flags
from lockstep.utils.cores import quota, usable_cores
from lockstep.version import __version__

Check = tuple[str, str, str]  # (ok | warn | fail, subject, what was found)

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
    print(f"{sorted(times)[25] * 1e6:.0f}", flush=True)
group.barrier()
cleanup_dist_env_and_memory()
os._exit(0)  # as workers leave: the library's own tear-down can abort a process that has done its work
"""


def run(argv: list[str]) -> int:
    """Print the checks; 0 when none failed. `--world-size N` asks how many ranks to try (default 2)."""
    if "-h" in argv or "--help" in argv:
        print(__doc__)
        print("usage: lockstep doctor [--world-size N]")
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
    if len(argv) == 2 and argv[0] == "--world-size" and argv[1].isdigit() and 1 <= int(argv[1]) <= 64:
        return int(argv[1])
    print(f"error: doctor takes only --world-size N with N from 1 to 64, not {' '.join(argv)!r}.", file=sys.stderr)
    raise SystemExit(2)


def checks(world: int) -> Iterator[Check]:
    """All checks, in the order they are worth reading."""
    yield from _python()
    yield from _packages()
    for subject, check in (("cores", _cpu), ("memory", _memory), ("shared memory", _shared_memory), ("gpu", _devices)):
        yield from _guarded(subject, check)
    yield from _guarded("threads", lambda: _threads(world))
    yield from _guarded("c++ compiler", _compiler)
    yield from _guarded("demo model", _demo_model)
    yield from _guarded("ranks", lambda: _ranks(world))


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


def _cpu() -> Iterator[Check]:
    cores, limit = usable_cores(), quota()
    cpus = sorted(chain(*cores))
    features = sorted(cpu_flags() & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"})
    found = f"{len(cores)} with {len(cpus)} CPUs ({_ranges(cpus)})" + (f", {limit:g} CPUs' worth of time" if limit else "")
    yield "ok", "cores", f"{found}; {', '.join(features) or 'no vector extensions that matter here'}"
    load = os.getloadavg()[0]
    if load > len(cpus):
        yield "warn", "load", f"{load:.1f} on {len(cpus)} CPUs: other work is running, figures will be noisy"


def _threads(world: int) -> Iterator[Check]:
    """The plan of cores and threads, as ranks will follow it: a line each."""
    plan = plan_here(world, ParallelConfig())
    rows = [(f"rank {rank}", f"{share.threads} thread{'s' if share.threads > 1 else ''}", share) for rank, share in enumerate(plan)]
    wide = max(len(threads) for _, threads, _ in rows)
    for rank, threads, share in rows:
        place = f"on CPUs {_ranges(share.lanes)} of {_ranges(share.cores)}" if share.cores else f"not bound: {share.why}"
        yield "ok", f"{rank} of {world}", f"{threads:<{wide}}  {place}" + ("; waits sleep at once" if share.crowded else "")


def _ranges(cpus: Iterable[int]) -> str:
    """ "0-3,8,10-11": how the system itself writes such lists."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


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


def _compiler() -> Iterator[Check]:
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    yield "ok", "c++ compiler", found or "none: not needed, the plain torch operations run"


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
    yield "ok", "ranks", f"{world} ranks met in {time.monotonic() - start:.1f} s; all-reduce of 8 KiB in {outs[0][0].strip()} us (gloo)"
