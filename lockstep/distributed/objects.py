"""Objects between the ranks of a group: msgpack over the CPU group."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
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


def _receive(receive: Callable[[Tensor], object], first: Tensor | None = None) -> Any:
    """The object whose messages `receive` fills in. first: where the first one goes."""
    first = torch.empty(_FRAME, dtype=torch.uint8) if first is None else first
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


class Incoming:
    """The next object that rank `src` sends to this one, as it comes. Only one of a sender at a time."""

    def __init__(self, comm: Communicator, src: int) -> None:
        self._comm, self._src = comm, src
        self._first = torch.empty(_FRAME, dtype=torch.uint8)
        self._handle = comm.irecv_(self._first, src)

    def is_completed(self) -> bool:
        """Whether it is here; of a large one, whether it has begun to come."""
        return self._handle.is_completed()

    def wait(self) -> Any:
        """The object."""

        def receive(message: Tensor) -> None:
            if message is first:
                self._handle.wait()
            else:
                self._comm.recv_(message, self._src)

        first = self._first
        return _receive(receive, first)


def all_gather(comm: Communicator, obj: Any) -> list[Any]:
    """Every rank's object, by rank."""
    if comm.world_size == 1:
        return [obj]
    data = codec.encode(obj)
    sizes = comm.all_gather(torch.tensor([len(data)]), 0).tolist()
    joined = memoryview(comm.all_gatherv(torch.frombuffer(bytearray(data), dtype=torch.uint8), sizes, 0).numpy())
    ends = list(accumulate(sizes))
    return [codec.decode(joined[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


def communicator_of(group: Any) -> Communicator:
    """The host communicator over a coordinator's CPU group or over a bare torch ProcessGroup with a gloo backend."""
    inner = getattr(group, "cpu_communicator", None)
    return inner if inner is not None else GlooCommunicator(group, _CPU)
