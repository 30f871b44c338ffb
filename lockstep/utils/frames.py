"""Messages over a stream socket: 4 bytes of length, then the message. Neither end ever blocks but where it says so."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

Message = TypeVar("Message")
# What decoding raises for bytes that are no message: also for text that is no UTF-8, and for arrays in arrays without end.
NO_MESSAGE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
MAX_BYTES = 1 << 30  # of one message; a longer one is not ours
_HEAD = struct.Struct("<I")
_CHUNK = 1 << 18


class Channel(Generic[Message]):
    """One end of a connection. The socket is its own: it closes it, and makes it non-blocking."""

    def __init__(self, connection: socket.socket, decode: Callable[[bytes], Message]) -> None:
        """decode: a message's bytes -> the message; raises what it likes when they are none."""
        connection.setblocking(False)
        self._socket, self._decode = connection, decode
        self._in, self._out = bytearray(), bytearray()
        self.broken: OSError | None = None  # what the connection failed with; a plain end is none

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def unsent(self) -> int:
        """Bytes that wait for room: select for writing, then `flush`."""
        return len(self._out)

    def send(self, message: bytes) -> None:
        """Queue a message and send what there is room for. Raises ConnectionError when the other end is gone."""
        assert len(message) <= MAX_BYTES, f"a message of {len(message)} bytes"
        self._out += _HEAD.pack(len(message))
        self._out += message
        self.flush()

    def flush(self) -> None:
        """Send what there is room for. Raises ConnectionError when the other end is gone."""
        while self._out:
            try:
                sent = self._socket.send(self._out)
            except BlockingIOError:
                return
            except OSError as error:
                raise self._failed(error) from None
            del self._out[:sent]

    def drain(self) -> None:
        """Block until everything is sent. Raises ConnectionError when the other end is gone."""
        self.flush()
        while self._out:
            _poll(self._socket, select.POLLOUT, None)
            self.flush()

    def wait(self, timeout_s: float | None) -> bool:
        """Block until there is something to receive; whether there is."""
        return _poll(self._socket, select.POLLIN, timeout_s)

    def receive(self) -> list[Message]:
        """The messages that have arrived whole. Raises ConnectionError once the other end has gone and all are taken."""
        ended = False
        while True:
            try:
                data = self._socket.recv(_CHUNK)
            except BlockingIOError:
                break
            except OSError as error:
                self._failed(error)
                data = b""
            if not data:
                ended = True
                break
            self._in += data
        found = self._take()
        if ended and not found:
            raise ConnectionResetError("the other end is gone")
        return found

    def _take(self) -> list[Message]:
        found, at = [], 0
        while len(self._in) - at >= _HEAD.size:
            (size,) = _HEAD.unpack_from(self._in, at)
            if size > MAX_BYTES:
                raise ConnectionAbortedError(f"a message of {size} bytes was announced: this is no peer of ours")
            if len(self._in) - at - _HEAD.size < size:
                break
            at += _HEAD.size
            found.append(self._decode(bytes(self._in[at : at + size])))
            at += size
        del self._in[:at]
        return found

    def _failed(self, error: OSError) -> ConnectionError:
        """Note why, once (the socket says it once); a host that cannot be reached is as gone as one that hung up."""
        self.broken = self.broken or error
        return error if isinstance(error, ConnectionError) else ConnectionAbortedError(error.errno, error.strerror)

    def close(self) -> None:
        self._socket.close()


def _poll(connection: socket.socket, event: int, timeout_s: float | None) -> bool:
    """Block until the event, or the connection's end. (Not `select`, which knows only the first 1024 descriptors.)"""
    poll = select.poll()
    poll.register(connection, event)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


def send_one(connection: socket.socket, message: bytes, deadline_s: float) -> None:
    """Send one message, blocking until `deadline_s` of the monotonic clock. Raises OSError (TimeoutError) when it cannot."""
    connection.settimeout(max(0.001, deadline_s - time.monotonic()))
    connection.sendall(_HEAD.pack(len(message)) + message)


def receive_one(connection: socket.socket, deadline_s: float, most_bytes: int) -> bytes:
    """The next message and not a byte more: what follows is for whoever gets the connection next. Blocks until `deadline_s`.

    Raises OSError (TimeoutError, ConnectionError) when none came whole, or a longer one than `most_bytes` was announced.
    """
    (size,) = _HEAD.unpack(_exactly(connection, _HEAD.size, deadline_s))
    if size > most_bytes:
        raise ConnectionAbortedError(f"a message of {size} bytes was announced: this is no peer of ours")
    return _exactly(connection, size, deadline_s)


def _exactly(connection: socket.socket, size: int, deadline_s: float) -> bytes:
    found = bytearray()
    while len(found) < size:
        connection.settimeout(max(0.001, deadline_s - time.monotonic()))
        data = connection.recv(size - len(found))
        if not data:
            raise ConnectionResetError("the other end is gone")
        found += data
    return bytes(found)
