"""Objects between the ranks of a group: msgpack over the CPU group, the length first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lockstep.distributed import codec
from lockstep.distributed.communicators.base import Communicator
from lockstep.distributed.communicators.gloo import GlooCommunicator
from lockstep.distributed.handles import Handle

_CPU = torch.device("cpu")


def _tensor(data: bytes) -> Tensor:
    # bytearray: torch wants writable memory. Empty buffers are refused by frombuffer.
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _length(data: bytes) -> Tensor:
    return torch.tensor([len(data)], dtype=torch.int64)


def broadcast(comm: Communicator, obj: Any, src: int) -> Any:
    """Rank `src`'s object on every rank; `src` gets its own object back, not a copy."""
    if comm.world_size == 1:
        return obj
    if comm.rank == src:
        data = codec.encode(obj)
        comm.broadcast_(_length(data), src)
        comm.broadcast_(_tensor(data), src)
        return obj
    length = torch.empty(1, dtype=torch.int64)
    comm.broadcast_(length, src)
    payload = torch.empty(int(length), dtype=torch.uint8)
    comm.broadcast_(payload, src)
    return codec.decode(memoryview(payload.numpy()))


def isend(comm: Communicator, obj: Any, dst: int) -> list[Handle]:
    """Start sending `obj`; nothing is sent when it cannot be encoded (TypeError)."""
    data = codec.encode(obj)
    return [comm.isend(_length(data), dst), comm.isend(_tensor(data), dst)]


def recv(comm: Communicator, src: int) -> Any:
    """The next object that rank `src` sends to this one."""
    length = torch.empty(1, dtype=torch.int64)
    comm.recv_(length, src)
    payload = torch.empty(int(length), dtype=torch.uint8)
    comm.recv_(payload, src)
    return codec.decode(memoryview(payload.numpy()))


def communicator_of(group: Any) -> Communicator:
    """The host communicator over a coordinator's CPU group or over a bare torch ProcessGroup with a gloo backend."""
    inner = getattr(group, "cpu_communicator", None)
    return inner if inner is not None else GlooCommunicator(group, _CPU)
