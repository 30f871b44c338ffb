"""What moves tensors between the ranks of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from lockstep.distributed.communicators.base import Communicator


def make_communicator(group: Any, backend: str, device: torch.device, timeout_s: float = 300.0) -> Communicator:
    """The communicator for tensors on `device` over torch group `group` of `backend` ("gloo" or "nccl"). Collective."""
    if "nccl" in backend and device.type == "cuda":
        from lockstep.distributed.communicators.nccl import NcclCommunicator

        return NcclCommunicator(group, device)
    from lockstep.distributed.communicators.select import host_communicator

    host = host_communicator(group, timeout_s)
    if device.type == "cpu":
        return host
    from lockstep.distributed.communicators.staged import StagedCommunicator

    return StagedCommunicator(host, device)
