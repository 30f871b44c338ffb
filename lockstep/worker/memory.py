"""How much memory a rank has, uses and may still take. All in bytes."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2**63 for "no limit"


def host_available_bytes() -> int:
    """What this process could still allocate: the host's available memory, or what its control groups leave."""
    return max(0, min([int(psutil.virtual_memory().available), *_cgroup_room()]))


def peak_bytes(device: torch.device) -> int:
    """The most memory this process held so far: resident on CPU, allocated on CUDA."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, one that two modules share counted once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


class PeakMeter:
    """`extra_bytes`: how far memory rose above its level at the start, at the highest, inside the `with` block."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.extra_bytes = 0

    @contextlib.contextmanager
    def measure(self) -> Iterator[PeakMeter]:
        """Reset the peak, run the block, read the peak."""
        before = self._begin()
        yield self
        self.extra_bytes = max(0, self._peak() - before)

    def _begin(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return int(torch.cuda.memory_allocated(self.device))
        with contextlib.suppress(OSError):  # without it the meter reads the peak of the process's life: too much, never too little
            Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")

    def _peak(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return int(torch.cuda.max_memory_allocated(self.device))
        return _status("VmHWM")


def _status(field: str) -> int:
    """A size from /proc/self/status; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0


def _cgroup_room() -> list[int]:
    """What each memory control group above this process leaves free. Page cache that can be dropped counts as free."""
    room = []
    for folder, limit, usage in _cgroups():
        try:
            most = int((folder / limit).read_text())
            used = int((folder / usage).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        if most < _UNLIMITED:
            room.append(most - used + _droppable(folder / "memory.stat"))
    return room


def _cgroups() -> Iterator[tuple[Path, str, str]]:
    """(folder, limit file, usage file) of every memory control group from this process's own up to the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts), -1, -1):
            yield (top.joinpath(*parts[:depth]), *names)


def _droppable(stat: Path) -> int:
    """Bytes of a group's page cache that the kernel would reclaim first."""
    with contextlib.suppress(OSError, ValueError):
        for line in stat.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    return 0
