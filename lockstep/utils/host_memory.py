"""How much memory this host would still give this process, in bytes."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

import psutil

from lockstep.utils import cgroups

_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2**63 for "no limit"


def host_available_bytes() -> int:
    """What this process could still allocate: the host's available memory, or what its control groups leave."""
    return max(0, min([int(psutil.virtual_memory().available), *_cgroup_room()]))


def resident_bytes() -> int:
    """Memory that this process has resident now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):  # not Linux
        return int(psutil.Process().memory_info().rss)


def _cgroup_room() -> list[int]:
    """What each memory control group above this process leaves free. Page cache that can be dropped counts as free."""
    room = []
    for folder, second in cgroups.folders("memory"):
        limit, usage = ("memory.max", "memory.current") if second else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        try:
            most = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if most < _UNLIMITED:
            room.append(most - used + _droppable(folder / "memory.stat"))
    return room


def _droppable(stat: Path) -> int:
    """Bytes of a group's page cache that the kernel would reclaim first."""
    with contextlib.suppress(OSError, ValueError):
        for line in stat.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    return 0
