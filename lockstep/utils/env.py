"""Every environment variable that lockstep reads, in one place."""

from __future__ import annotations

import os


def _text(name: str, default: str = "") -> str:
    return os.environ.get(name, default).strip()


def host_ip() -> str:
    """LOCKSTEP_HOST_IP: the address other hosts reach this one at; empty means find it."""
    return _text("LOCKSTEP_HOST_IP")


def network_interface() -> str:
    """LOCKSTEP_INTERFACE: the interface ranks talk over; empty means loopback on one host, else the route's."""
    return _text("LOCKSTEP_INTERFACE")


def cuda_visible_devices() -> str | None:
    """CUDA_VISIBLE_DEVICES as set, None when unset."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def hub_offline() -> bool:
    """HF_HUB_OFFLINE: whether the model hub must not be asked."""
    return _text("HF_HUB_OFFLINE") not in ("", "0")


def torchrun_rank() -> tuple[int, int, int] | None:
    """(RANK, LOCAL_RANK, WORLD_SIZE) as torchrun sets them, None when not started by it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0")), int(os.environ["WORLD_SIZE"])


def debug_fault() -> str:
    """LOCKSTEP_FAULT: `phase:rank:action`, a fault that tests inject; empty in normal life."""
    return _text("LOCKSTEP_FAULT")


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment for a child, with `changes`."""
    return {**os.environ, **changes}
