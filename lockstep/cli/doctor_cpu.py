"""doctor's checks of the processor: its cores, the plan of threads on them, the kernels, and the memory they read from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from lockstep.config.tree import ParallelConfig
from lockstep.executor.affinity import plan_here
from lockstep.kernels import amx, build
from lockstep.kernels.library import choose, load
from lockstep.kernels.variants import cpu_flags, usable
from lockstep.utils import env
from lockstep.utils.cores import quota, usable_cores

Check = tuple[str, str, str]  # (ok | warn | fail, subject, what was found)

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def cores() -> Iterator[Check]:
    """What there is to compute on, and whether somebody else does."""
    found, limit = usable_cores(), quota()
    cpus = sorted(chain(*found))
    features = sorted(cpu_flags() & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"})
    text = f"{len(found)} with {len(cpus)} CPUs ({ranges(cpus)})" + (f", {limit:g} CPUs' worth of time" if limit else "")
    yield "ok", "cores", f"{text}; {', '.join(features) or 'no vector extensions that matter here'}"
    load_now = os.getloadavg()[0]
    if load_now > len(cpus):
        yield "warn", "load", f"{load_now:.1f} on {len(cpus)} CPUs: other work is running, figures will be noisy"


def threads(world: int) -> Iterator[Check]:
    """The plan of cores and threads for `world` ranks, as they will follow it: a line each."""
    plan = plan_here(world, ParallelConfig())
    counts = [f"{share.threads} thread{'s' if share.threads > 1 else ''}" for share in plan]
    for rank, (count, share) in enumerate(zip(counts, plan, strict=True)):
        place = f"not bound: {share.why}"
        if share.cores:
            lanes = share.lanes or share.cores
            place = f"on CPU{'s' if len(lanes) > 1 else ''} {ranges(lanes)}"
            place += f" (kept on {ranges(share.cores)})" if len(share.cores) > len(lanes) else ""
        waits = "; waits hand the CPU on, then sleep" if share.crowded else ""
        yield "ok", f"rank {rank} of {world}", f"{count:<{max(map(len, counts))}}  {place}{waits}"


def kernels() -> Iterator[Check]:
    """Which kernel library runs here, and where it comes from."""
    chosen, names = choose(), ", ".join(variant.name for variant in usable())
    if chosen is None:
        yield "warn", "kernels", f"none: LOCKSTEP_KERNELS=torch asks for plain torch operations; this CPU can run {names}"
        return
    yield "ok", "kernels", f"{chosen.name}{', as LOCKSTEP_KERNELS says' if env.kernels() else ''}; this CPU can run {names}"
    if "amx_tile" in cpu_flags():
        refused = amx.refusal()
        yield ("warn", "amx", refused) if refused else ("ok", "amx", "this process may use its tiles")
    try:
        compiler = " ".join(build.compiler())
    except build.BuildError as error:
        compiler = ""
        reason = str(error)
    yield "ok", "c++ compiler", compiler or "none: needed only where no library for this CPU is shipped"
    path = build.built(chosen)
    if path is not None:
        load(path)  # a library that cannot be loaded is a failed check
        where = "shipped with lockstep" if path.parent == build.SHIPPED else f"built before, in {path.parent}"
        yield "ok", "library", f"{path.name}, {where}"
    elif compiler:
        yield "ok", "library", f"not there yet: the first start builds it into {build.cache_folder()}, which takes a minute or less"
    else:
        yield "warn", "library", f"cannot be built, so plain torch operations run, slower: {reason}"


def huge_pages() -> Iterator[Check]:
    """Whether weights, and what ranks share, may lie in huge pages."""
    for name, what in (("enabled", "weights"), ("shmem_enabled", "memory shared by ranks")):
        try:
            text = (HUGE_PAGES / name).read_text()
        except OSError:
            yield "ok", "huge pages", f"{what}: this system does not tell ({HUGE_PAGES / name} cannot be read)"
            continue
        setting = text.partition("[")[2].partition("]")[0]
        if name == "enabled" and setting == "never":
            remedy = f"echo madvise > {HUGE_PAGES / name}"
            yield "warn", "huge pages", f"{what}: never, which costs up to 40 % in reading them; as root: {remedy}"
        else:
            yield "ok", "huge pages", f"{what}: {setting}"


def ranges(cpus: Iterable[int]) -> str:
    """ "0-3,8,10-11": how the system itself writes such lists."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
