"""What the API processes and the engine's process say to each other: msgspec structs over ZeroMQ, one in each frame.

An API process is admitted once both sides have proved that they hold the run's secret (`utils.handshake`); until then the
engine takes nothing from it. Nothing here could execute anything.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec

from lockstep.cluster.health import EngineHealth
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.engine.sizing import MemoryPlan
from lockstep.protocol import EngineOutput, EngineRequest
from lockstep.utils import handshake

MAX_BYTES = 64 << 20  # of one message, either way
NONCE_BYTES = 32


class Launch(msgspec.Struct, tag="launch", array_like=True, kw_only=True):
    """All that the engine's process is told, as the first message from who starts it. client: "module:function" that makes it."""

    config: EngineConfig
    spec: ModelSpec
    folder: str
    parent_pid: int
    follow_thread: bool  # whether the thread that started it lives as long as that process
    sys_path: list[str]
    endpoint: str
    secret: str
    client: str
    paused: bool = False  # how it starts: as the one before it was
    sleep_level: int = 0
    restarts: int = 0  # engines before it


class Hello(msgspec.Struct, tag="hello", array_like=True):
    """The first message of an API process."""

    nonce: bytes


class Challenge(msgspec.Struct, tag="challenge", array_like=True):
    nonce: bytes
    proof: bytes


class Proof(msgspec.Struct, tag="proof", array_like=True):
    proof: bytes


class Welcome(msgspec.Struct, tag="welcome", array_like=True):
    """The engine runs. config: with every None filled in."""

    config: EngineConfig
    memory: MemoryPlan


class Add(msgspec.Struct, tag="add", array_like=True):
    request: EngineRequest


class Abort(msgspec.Struct, tag="abort", array_like=True):
    request_ids: list[str]


class Call(msgspec.Struct, tag="call", array_like=True):
    """Call one of `engine_server.CALLS`; answered by `Answer` or `Refused` with the same id."""

    id: int
    method: str
    args: list[Any]


class Goodbye(msgspec.Struct, tag="goodbye", array_like=True):
    """The last message of an API process: it hangs up, and what it has unfinished is not wanted any more."""


class Outputs(msgspec.Struct, tag="outputs", array_like=True):
    outputs: list[EngineOutput]


class Answer(msgspec.Struct, tag="answer", array_like=True):
    id: int
    value: msgspec.Raw


class Refused(msgspec.Struct, tag="refused", array_like=True):
    """A call raised. wrong: what was asked for was wrong, rather than that it failed."""

    id: int
    message: str
    wrong: bool


class Pulse(msgspec.Struct, tag="pulse", array_like=True):
    """How the engine is, every `PULSE_S` seconds."""

    health: EngineHealth


class Dropped(msgspec.Struct, tag="dropped", array_like=True):
    """The API process did not read for too long: what it ran was aborted. It says Hello again, and gives all of it anew."""


class Dead(msgspec.Struct, tag="dead", array_like=True):
    """The engine can run no more; every request has ended. The process ends."""

    message: str


Order = Hello | Proof | Add | Abort | Call | Goodbye
Reply = Challenge | Welcome | Outputs | Pulse | Answer | Refused | Dropped | Dead

encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode


def nonce() -> bytes:
    return os.urandom(NONCE_BYTES)


def engine_proof(secret: str, theirs: bytes, ours: bytes) -> bytes:
    """What the engine's process says to be believed; nonces: of the API process, of the engine's."""
    return handshake.prove(secret, "engine", theirs, ours)


def api_proof(secret: str, ours: bytes, theirs: bytes) -> bytes:
    """What an API process says to be believed; nonces: as above."""
    return handshake.prove(secret, "api", ours, theirs)


def job_of(request_id: str) -> str:
    """The job of an engine's request: `JOB`, or `JOB.CHOICE` where it makes several completions."""
    return request_id.rpartition(".")[0] or request_id
