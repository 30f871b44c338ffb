"""What the leader and the agents of other hosts say to each other, over one TCP connection each. msgspec structs only.

    leader                         agent
                                             the greeting: see `distributed.greeting`
      Start      ---------------->           when every node is there
                 <----------------  Meeting  from the node of rank 0, where that is not the leader's
      Order, Stacks, Again, End ->
                 <----------------  Replied, Said, Ended, Leaving
      Beat       <--------------->  Beat     from the welcome on; the agent's carry its ranks' progress cells

A frame is 4 bytes of length and the message. What the ranks of a node say is passed on as bytes: only the leader reads it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.distributed.greeting import MESSAGE_BYTES as GREETING_BYTES
from lockstep.distributed.greeting import Challenge, Hello, Refused, Sides, Welcome, texts
from lockstep.utils.frames import NO_MESSAGE

PROTOCOL = 5
SIDES = Sides("leader", "agent")
MESSAGE_BYTES = 1 << 28  # no message after the greeting is longer
BEAT_S = 0.5
# Settings that all nodes must say alike; everything else is the leader's to say.
AGREED = (
    *("nnodes", "data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size"),
    *("decode_context_parallel_size", "enable_expert_parallel", "pipeline_layer_partition", "model", "revision", "dtype"),
    *("quantization", "load_format", "device"),
)


class Start(msgspec.Struct, tag="start", array_like=True):
    """Start the ranks of this node. host, port: of the rendezvous that rank 0 serves; port 0: that is to be here.

    again: the leader comes again should this start go wrong, and waits for this node then.
    """

    config: EngineConfig
    spec: ModelSpec
    host: str
    port: int
    again: bool = False


class Meeting(msgspec.Struct, tag="meeting", array_like=True):
    """Where the ranks meet: rank 0 of this node serves the rendezvous there."""

    host: str
    port: int


class Order(msgspec.Struct, tag="order", array_like=True, gc=False):
    """An encoded `wire.Order`, for every rank of the node."""

    body: bytes


class Stacks(msgspec.Struct, tag="stacks", array_like=True):
    """Have the ranks write their Python stacks."""


class Again(msgspec.Struct, tag="again", array_like=True):
    """From here on the leader comes again should this go wrong, and waits for this node then."""


class End(msgspec.Struct, tag="end", array_like=True):
    """It is over. reason: what went wrong, "" for an orderly end."""

    reason: str


class Replied(msgspec.Struct, tag="replied", array_like=True, gc=False):
    """Bytes from a rank's reply socket: frames of `wire`, or parts of them. Empty: it closed the socket."""

    rank: int
    data: bytes


class Said(msgspec.Struct, tag="said", array_like=True, gc=False):
    """Bytes that a rank wrote on standard output or error."""

    rank: int
    data: bytes


class Ended(msgspec.Struct, tag="ended", array_like=True):
    """A rank's process ended; all that it said has been sent before. oom: the host's out-of-memory killer was busy."""

    rank: int
    exitcode: int
    oom: bool


class Beat(msgspec.Struct, tag="beat", array_like=True, gc=False):
    """A sign of life. now_ns: the sender's monotonic clock. By rank of the node: progress cells, and the kernel's letters."""

    now_ns: int
    cells: list[bytes] = []
    states: list[str] = []


class Leaving(msgspec.Struct, tag="leaving", array_like=True):
    """The agent goes, and takes its ranks along."""

    reason: str


Message = Challenge | Hello | Welcome | Refused | Start | Meeting | Order | Stacks | Again | End | Replied | Said | Ended | Beat | Leaving

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode


class FrameError(ValueError):
    """Bytes that no node of ours would send."""


def frame(message: Message) -> bytes:
    """A message as it goes over the connection. Raises FrameError for one that is too long."""
    body = _encode(message)
    if len(body) > MESSAGE_BYTES:
        raise FrameError(f"a message of {len(body)} bytes is longer than the {MESSAGE_BYTES} that nodes send each other")
    return struct.pack("<I", len(body)) + body


class Frames:
    """Puts the byte stream of one connection together again."""

    def __init__(self) -> None:
        self.limit = GREETING_BYTES  # until it is known who speaks
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages completed by `data`. Raises FrameError for bytes that are none."""
        self._buffer += data
        while len(self._buffer) >= 4:
            (size,) = struct.unpack_from("<I", self._buffer)
            if size > self.limit:
                raise FrameError(f"a frame of {size} bytes where at most {self.limit} are allowed")
            if len(self._buffer) < 4 + size:
                return
            body = bytes(memoryview(self._buffer)[4 : 4 + size])
            del self._buffer[: 4 + size]
            try:
                message = _decode(body)
            except NO_MESSAGE as e:
                raise FrameError(f"a message that cannot be decoded: {e}") from None
            yield message


def agreed_settings(config: EngineConfig, spec: ModelSpec) -> dict[str, str]:
    """What all nodes must say alike, by name."""
    model = hashlib.sha256(msgspec.msgpack.encode(spec)).hexdigest()[:16]
    settings = texts(config, AGREED) | {"the model's config.json": model}
    local = Path(settings["model"]).expanduser()
    if settings["model"] and local.is_dir():  # each host has it where it likes
        settings["model"] = local.resolve().name
    return settings
