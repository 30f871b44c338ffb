"""What the router and a replica say to each other: msgspec structs, nothing that could execute anything."""

from __future__ import annotations

from typing import Any

import msgspec

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.engine.sizing import MemoryPlan
from lockstep.engine.stats import EngineLoad, EngineReport
from lockstep.protocol import EngineOutput, EngineRequest
from lockstep.protocol.health import RankHealth


class Launch(msgspec.Struct, tag="launch", array_like=True, kw_only=True):
    """All that a replica process is told before its first order, as the first message from who starts it.

    router_fd: its connection to the router, where that is not the one that this message comes over.
    again: another one is started also when this start fails.
    """

    config: EngineConfig  # of this replica: data_parallel_rank says which
    spec: ModelSpec
    folder: str
    parent_pid: int
    follow_thread: bool  # whether the thread that started it lives as long as that process
    sys_path: list[str]
    router_fd: int | None = None
    again: bool = True


class Add(msgspec.Struct, tag="add", array_like=True):
    """Run a request. ticket: the router's number for it, see LoadBook."""

    request: EngineRequest
    ticket: int


class Abort(msgspec.Struct, tag="abort", array_like=True):
    request_ids: list[str]


class Call(msgspec.Struct, tag="call", array_like=True):
    """Call a method of the replica's engine (see `replica_main.CALLS`); answered by `Answer` or `Refused` with the same id."""

    id: int
    method: str
    args: list[Any]


class Stop(msgspec.Struct, tag="stop", array_like=True):
    """Shut down and exit."""


class Ready(msgspec.Struct, tag="ready", array_like=True):
    """The engine runs. config: with every None filled in."""

    config: EngineConfig
    memory: MemoryPlan


class News(msgspec.Struct, tag="news", array_like=True):
    """What one step brought. load: now and then. ticket: the newest request that it counts."""

    outputs: list[EngineOutput]
    load: EngineLoad | None
    ticket: int


class Pulse(msgspec.Struct, tag="pulse", array_like=True):
    """How the replica is and what it came to, every `PULSE_S` seconds, also while it has nothing to do, or is in a step."""

    ranks: list[RankHealth]
    report: EngineReport


class Answer(msgspec.Struct, tag="answer", array_like=True):
    id: int
    value: msgspec.Raw


class Refused(msgspec.Struct, tag="refused", array_like=True):
    """A call raised, and the replica lives on."""

    id: int
    message: str


class Failed(msgspec.Struct, tag="failed", array_like=True):
    """The engine can run no more and this process ends; fields as ExecutorError has them."""

    message: str
    rank: int | None
    phase: str
    exitcode: int | None
    kind: str
    error_type: str
    log_tail: list[str]
    ranks: list[RankHealth] = []
    incident: str = ""


class Worked(msgspec.Struct, tag="worked", array_like=True):
    """It brought tokens: a replica's process says so, once, to the keeper that started it."""


Order = Launch | Add | Abort | Call | Stop
Reply = Ready | News | Pulse | Answer | Refused | Failed

encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
