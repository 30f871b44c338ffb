"""What driver and ranks say to each other. msgspec structs only: nothing on these channels can execute anything.

Down, through the message queue, the same to all ranks, executed in order: `Step`, `Call`, `Stop`.
Up, through each rank's own socket: `Ready` once, then answers; step results through `results.py` where it has room. Every
order has an id and every answer names the order it belongs to, so that a late or failed answer can never be taken for
another's.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.distributed.message_queue import QueueHandle
from lockstep.distributed.progress import BoardHandle
from lockstep.protocol import StepPlan, StepResult
from lockstep.utils.cores import RankCores


class Step(msgspec.Struct, tag="step", array_like=True, gc=False):
    """Run a step. Only the output rank answers, and whichever rank raises."""

    id: int
    plan: StepPlan


class Call(msgspec.Struct, tag="call", array_like=True):
    """Call a method of the worker. Every rank answers."""

    id: int
    method: str
    args: list[Any]
    kwargs: dict[str, Any]


class Stop(msgspec.Struct, tag="stop", array_like=True):
    """Clean up and exit."""


class Ready(msgspec.Struct, tag="ready", array_like=True):
    """The model is loaded; orders may come."""


class StepDone(msgspec.Struct, tag="step_done", array_like=True, gc=False):
    id: int
    result: StepResult


class CallDone(msgspec.Struct, tag="call_done", array_like=True):
    id: int
    value: msgspec.Raw


class Raised(msgspec.Struct, tag="raised", array_like=True):
    """An exception. id 0: while starting. `fatal`: the ranks may have left lockstep and cannot go on."""

    id: int
    phase: str
    error_type: str
    message: str
    traceback: str
    fatal: bool


Order = Step | Call | Stop
Answer = Ready | StepDone | CallDone | Raised

encode_order = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
encode_value = msgspec.msgpack.Encoder().encode
decode_value = msgspec.msgpack.Decoder().decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode


class Launch(msgspec.Struct, kw_only=True):
    """Everything a worker process is told, through an inherited descriptor, before its first order."""

    rank: int
    local_rank: int
    world_size: int
    output_rank: int
    parent_pid: int
    death_fd: int
    reply_fd: int
    queue: QueueHandle
    results: QueueHandle | None  # of the output rank: where it writes step results; None: to the reply socket
    board: BoardHandle
    share: RankCores
    worker_cls: str  # "module:Class"
    sys_path: list[str]
    rendezvous: tuple[str, int]  # host and port
    listen_fd: int  # the bound rendezvous socket, on rank 0; -1 elsewhere
    config: EngineConfig
    spec: ModelSpec
    folder: str


def frame(answer: Answer) -> bytes:
    """An answer as it goes over the socket: 4 bytes of length, then msgpack."""
    body = encode_value(answer)
    return struct.pack("<I", len(body)) + body


class FrameReader:
    """Puts the byte stream of one socket together again."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Answer]:
        """The answers completed by `data`. Raises msgspec.DecodeError when it is none of ours."""
        self._buffer += data
        while len(self._buffer) >= 4:
            (size,) = struct.unpack_from("<I", self._buffer)
            if len(self._buffer) < 4 + size:
                return
            body = bytes(self._buffer[4 : 4 + size])
            del self._buffer[: 4 + size]
            yield decode_answer(body)
