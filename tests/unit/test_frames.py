"""Messages over a socket, cut and joined wherever the socket likes."""

from __future__ import annotations

import random
import socket
import struct

import pytest

from lockstep.utils.frames import MAX_BYTES, Channel


def pair() -> tuple[Channel[bytes], Channel[bytes]]:
    a, b = socket.socketpair()
    return Channel(a, bytes), Channel(b, bytes)


def test_messages_arrive_whole_and_in_order() -> None:
    a, b = pair()
    source = random.Random(1)
    sent = [source.randbytes(source.choice([0, 1, 100, 70_000, 600_000])) for _ in range(30)]
    found: list[bytes] = []
    for message in sent:
        a.send(message)  # never blocks, though the socket takes only so much
        if b.wait(0):
            found += b.receive()
    while a.unsent:
        a.flush()
        found += b.receive()
    found += b.receive()
    assert found == sent and b.receive() == [] and not b.wait(0)


def test_bytes_one_by_one() -> None:
    raw, end = socket.socketpair()
    channel: Channel[bytes] = Channel(end, bytes)
    for byte in struct.pack("<I", 3) + b"abc" + struct.pack("<I", 0):
        assert channel.receive() in ([], [b"abc"])
        raw.send(bytes([byte]))
    assert channel.receive() == [b""]


def test_the_end_comes_after_the_last_message() -> None:
    a, b = pair()
    a.send(b"last words")
    a.close()
    assert b.receive() == [b"last words"]
    with pytest.raises(ConnectionError):
        b.receive()
    with pytest.raises(ConnectionError):
        b.send(b"anyone?")
        b.send(b"anyone?")


def test_a_length_that_is_none_of_ours() -> None:
    raw, end = socket.socketpair()
    raw.send(struct.pack("<I", MAX_BYTES + 1))
    with pytest.raises(ConnectionAbortedError, match="no peer of ours"):
        Channel(end, bytes).receive()
