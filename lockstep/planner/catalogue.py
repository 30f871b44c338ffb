"""Devices and clusters by name: the shipped catalogue, a YAML file of six numbers, and strings such as 2x8xH100."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from lockstep.planner.hardware import Cluster, Device, Link, make_cluster

DATA = Path(__file__).parent / "data"
_CLUSTER = re.compile(r"(?:(\d+)x)?(?:(\d+)x)?([A-Za-z][\w.+-]*)")


def cluster(text: str) -> Cluster:
    """ "2x8xH100": 2 nodes of 8; "8xH200": one node of 8; "H100": one device. Raises ValueError for what is neither."""
    found = _CLUSTER.fullmatch(text.strip())
    if not found:
        raise ValueError(f"cluster {text!r}: write NODESxDEVICESxDEVICE, as in 2x8xH100 or 8xH200.")
    first, second, name = found.groups()
    nodes, per_node = (int(first), int(second)) if second else (1, int(first or 1))
    return make_cluster(device(name), nodes, per_node)


@cache
def device(name: str) -> Device:
    """A device of the catalogue by its name or an alias, in any case."""
    raw = _DEVICES.get(name.upper())
    if raw is None:
        raise ValueError(
            f"device {name!r} is not in the catalogue, which has {', '.join(sorted(_DEVICES))}: give its six numbers in a file."
        )
    return Device(**raw)


_DEVICES: dict[str, dict[str, Any]] = {
    "H100": {
        "name": "H100",
        "flops": {"bfloat16": 989e12, "fp8": 1978e12, "float32": 67e12},
        "memory_bandwidth": 3.35e12,
        "capacity_bytes": 81559 << 20,
        "scale_up": Link(4.2e-6, 0.09e-6, 305e9),
        "scale_out": Link(19.5e-6, 1e-6, 36e9),
    }
}
