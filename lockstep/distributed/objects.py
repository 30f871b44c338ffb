"""Objects between the ranks of a group: msgpack over the CPU group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lockstep.distributed import codec
from lockstep.distributed.communicators.base import Communicator
from lockstep.distributed.communicators.gloo import GlooCommunicator
from lockstep.distributed.handles import Handle

_CPU = torch.device("cpu")


# The first message of an object: its length, then as much of it as fits. Most objects need no second one.
_FRAME, _HEAD = 4096, 8


def _messages(data: bytes) -> list[Tensor]:
    """The one or two messages of an object, as byte tensors (a bytearray, because torch wants writable memory)."""
    first = bytearray(_FRAME)
    first[:_HEAD] = len(data).to_bytes(_HEAD, "little")
    first[_HEAD : _HEAD + len(data)] = data[: _FRAME - _HEAD]
    messages = [torch.frombuffer(first[:_FRAME], dtype=torch.uint8)]
    if len(data) > _FRAME - _HEAD:
        messages.append(torch.frombuffer(bytearray(data[_FRAME - _HEAD :]), dtype=torch.uint8))
    return messages


def _receive(receive: Callable[[Tensor], object]) -> Any:
    """The object whose messages `receive` fills in."""
    first = torch.empty(_FRAME, dtype=torch.uint8)
    receive(first)
    raw = memoryview(first.numpy())
    length = int.from_bytes(raw[:_HEAD], "little")
    if length <= _FRAME - _HEAD:
        return codec.decode(raw[_HEAD : _HEAD + length])
    rest = torch.empty(length - (_FRAME - _HEAD), dtype=torch.uint8)
    receive(rest)
    return codec.decode(bytes(raw[_HEAD:]) + bytes(rest.numpy()))


def broadcast(comm: Communicator, obj: Any, src: int) -> Any:
    """Rank `src`'s object on every rank; `src` gets its own object back, not a copy."""
    if comm.world_size == 1:
        return obj
    if comm.rank == src:
        for message in _messages(codec.encode(obj)):
            comm.broadcast_(message, src)
        return obj
    return _receive(lambda message: comm.broadcast_(message, src))


def isend(comm: Communicator, obj: Any, dst: int) -> list[Handle]:
    """Start sending `obj`; nothing is sent when it cannot be encoded (TypeError)."""
    return [comm.isend(message, dst) for message in _messages(codec.encode(obj))]


def recv(comm: Communicator, src: int) -> Any:
    """The next object that rank `src` sends to this one."""
    return _receive(lambda message: comm.recv_(message, src))


def communicator_of(group: Any) -> Communicator:
    """The host communicator over a coordinator's CPU group or over a bare torch ProcessGroup with a gloo backend."""
    inner = getattr(group, "cpu_communicator", None)
    return inner if inner is not None else GlooCommunicator(group, _CPU)
