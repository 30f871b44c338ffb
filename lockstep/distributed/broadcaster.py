"""Message queues between the ranks of a group on one host: faster than a broadcast through sockets, and no rank polls.

A queue has no name: its descriptors are handed from the writer to each reader through a Unix socket that exists only
while they meet, in a folder that only this user can enter.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Sequence
from typing import Any

import msgspec

from lockstep.distributed import codec, objects
from lockstep.distributed.communicators.base import Communicator
from lockstep.distributed.message_queue import MessageQueue, MessageReader, QueueHandle

CHUNK_BYTES, CHUNKS = 1 << 22, 6
_MEET_S = 60.0


def connect(
    comm: Communicator, writer: int, readers: Sequence[int], chunk_bytes: int = CHUNK_BYTES, chunks: int = CHUNKS
) -> MessageQueue | MessageReader | None:
    """A queue from rank `writer` to ranks `readers`: this rank's end of it, None for ranks with no part in it.

    Collective over `comm`, whose ranks share a host. Raises TimeoutError (OSError) when a reader does not come.
    """
    folder = tempfile.mkdtemp(prefix="lockstep_") if comm.rank == writer else ""
    end: MessageQueue | MessageReader | None = None
    try:
        if comm.rank == writer:
            path = os.path.join(folder, "meet")
            with socket.socket(socket.AF_UNIX) as door:
                door.bind(path)
                door.listen(len(readers))
                door.settimeout(_MEET_S)
                objects.broadcast(comm, path, writer)
                end = MessageQueue.create(len(readers), chunk_bytes, chunks)
                for _ in readers:
                    _hand_over(door, end, list(readers))
        else:
            path = objects.broadcast(comm, None, writer)
            if comm.rank in readers:
                end = _receive(path, comm.rank)
        comm.barrier()
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    return end


def _hand_over(door: socket.socket, queue: MessageQueue, readers: list[int]) -> None:
    guest, _ = door.accept()
    with guest:
        guest.settimeout(_MEET_S)
        reader = readers.index(int.from_bytes(guest.recv(8), "little"))
        handle = queue.handle(reader)
        socket.send_fds(guest, [msgspec.msgpack.encode(handle)], list(handle.fds))


def _receive(path: str, rank: int) -> MessageReader:
    with socket.socket(socket.AF_UNIX) as guest:
        guest.settimeout(_MEET_S)
        guest.connect(path)
        guest.sendall(rank.to_bytes(8, "little"))
        data, fds, _, _ = socket.recv_fds(guest, 4096, 8)
    handle = msgspec.msgpack.decode(data, type=QueueHandle)
    own = dict(zip(handle.fds, fds, strict=True))
    bells = [(own[read], own[write]) for read, write in (handle.reader_bell, handle.writer_bell)]
    return MessageQueue.attach(
        QueueHandle(own[handle.memory_fd], handle.n_readers, handle.chunk_bytes, handle.chunks, handle.reader, bells[0], bells[1])
    )


class GroupBroadcaster:
    """One rank's end of a group's broadcast queue. writer_rank: in the group; None when the writer is outside it."""

    def __init__(self, end: Any, writer_rank: int | None) -> None:
        self.end, self.writer_rank = end, writer_rank

    def broadcast_object(self, obj: Any = None, timeout: float | None = None) -> Any:
        """The writer's object on every rank. Raises TimeoutError after `timeout` s, QueueClosed when the other side is gone."""
        if isinstance(self.end, MessageReader):
            return codec.decode(self.end.dequeue(timeout))
        self.end.enqueue(codec.encode(obj), timeout)
        return obj

    def close(self) -> None:
        """Let go of the queue. May be called twice."""
        self.end.close()
