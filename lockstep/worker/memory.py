"""How much memory a rank has, uses and may still take. All in bytes."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from lockstep.distributed.communicators.shm import ShmCommunicator
from lockstep.distributed.groups import ParallelGroups
from lockstep.models.decoder import DecoderModel
from lockstep.utils.host_memory import host_available_bytes

__all__ = ["PeakMeter", "host_available_bytes", "owned_bytes", "peak_bytes", "weight_bytes"]


def peak_bytes(device: torch.device) -> int:
    """The most memory this process held so far: resident on CPU, allocated on CUDA."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, packed ones included, one that two modules share counted once."""
    packed = sum(module.packed.nbytes for module in model.modules() if getattr(module, "packed", None) is not None)
    return packed + sum(p.numel() * p.element_size() for p in model.parameters())


def owned_bytes(model: DecoderModel, kv_bytes: int, state_bytes: int, groups: ParallelGroups) -> int:
    """All that the engine itself holds on this rank; libraries and what a step gives back at its end do not count.

    It only grows, with the most rows that sampled in one step. Models that run torch's operations have no buffers of their own.
    """
    buffers = 0 if model.native is None else model.native.held_bytes
    logits = model.head.logits_bytes if model.is_last else 0
    found = {id(c): c for g in (groups.tp, groups.pp, groups.world) for c in (g.communicator, g.cpu_communicator)}
    shared = sum(c.nbytes for c in found.values() if isinstance(c, ShmCommunicator))
    return weight_bytes(model) + kv_bytes + state_bytes + buffers + logits + shared


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
