"""The control groups above this process: where a container's limits are written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def folders(controller: str) -> Iterator[tuple[Path, bool]]:
    """(folder, whether it is of version 2) of every control group of `controller`, from this process's own up to the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = Path("/sys/fs/cgroup") / (controller if controllers else "")
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:depth]), not controllers
