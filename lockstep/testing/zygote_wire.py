"""Frames between a test process and its zygote: a length, then msgpack."""

from __future__ import annotations

import select
import socket
import time
from typing import Any

import msgspec


class Frames:
    """Whole messages over a stream socket."""

    def __init__(self, stream: socket.socket) -> None:
        self.stream = stream

    def fileno(self) -> int:
        return self.stream.fileno()

    def send(self, message: dict[str, Any]) -> None:
        data = msgspec.msgpack.encode(message)
        self.stream.sendall(len(data).to_bytes(8, "little") + data)

    def receive(self, timeout_s: float | None = None) -> dict[str, Any] | None:
        """The next message; None on end-of-file or after `timeout_s`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        head = self._exactly(8, deadline)
        data = None if head is None else self._exactly(int.from_bytes(head, "little"), deadline)
        if data is None:
            return None
        message: dict[str, Any] = msgspec.msgpack.decode(data)
        return message

    def _exactly(self, size: int, deadline: float | None) -> bytes | None:
        parts = bytearray()
        while len(parts) < size:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self.stream], [], [], left)[0]:
                return None
            try:
                got = self.stream.recv(min(size - len(parts), 1 << 20))
            except OSError:
                return None
            if not got:
                return None
            parts += got
        return bytes(parts)

    def close(self) -> None:
        self.stream.close()
