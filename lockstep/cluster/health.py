"""How all replicas are, from what they say of themselves: no round trip for who asks."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lockstep.cluster import wire
from lockstep.cluster.replica import ReplicaHandle
from lockstep.cluster.supervisor import State, Supervisor
from lockstep.engine.stats import EngineStats
from lockstep.executor.contract import ExecutorError
from lockstep.protocol.health import SILENT_S, RankHealth
from lockstep.utils import procs


class ReplicaHealth(msgspec.Struct, kw_only=True, frozen=True):
    """One replica at one moment. lost_*: its last failure, until it is ready again."""

    replica: int
    state: str  # starting, ready, waiting (for its next start), given up, stopped
    for_s: float = 0.0  # so long in this state
    pid: int = 0  # 0: it does not run, or on another host
    restarts: int = 0
    silent_s: float = 0.0  # since it was last heard
    ranks: list[RankHealth] = []
    stats: EngineStats | None = None  # when it was last heard
    lost_why: str = ""
    lost_rank: int | None = None
    lost_phase: str = ""
    lost_kind: str = ""
    incident: str = ""  # file about that

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self.state == State.READY.value

    def problems(self) -> list[dict[str, Any]]:
        """What is not well, an entry for each rank that does not answer, or for the replica; empty when all is."""
        if not self.ready:
            why = self.lost_why or f"it is {self.state}"
            entry = {"replica": self.replica, "state": self.state, "for_s": round(self.for_s, 2), "why": why, "incident": self.incident}
            return [{**entry, "rank": self.lost_rank, "phase": self.lost_phase, "kind": self.lost_kind}]
        late = [rank for rank in self.ranks if not rank.answers]
        if self.silent_s > SILENT_S:
            late = self.ranks or [RankHealth(rank=0)]
        return [
            {
                "replica": self.replica,
                "state": self.state,
                "rank": rank.rank,
                "phase": rank.phase,
                "kind": "stopped" if rank.stopped else "silent",
                "for_s": round(rank.beat_age_s + self.silent_s, 2),
                "why": f"no sign of life for {rank.beat_age_s + self.silent_s:.1f} s, at {rank.where or 'an unknown place'}",
            }
            for rank in late
        ]


class EngineHealth(msgspec.Struct, kw_only=True, frozen=True):
    """The engine at one moment. pid, born: of the process that the replicas report to, see `procs.birth`."""

    pid: int
    born: int
    replicas: list[ReplicaHealth]
    paused: bool = False
    sleep_level: int = 0

    @property
    def takes_requests(self) -> bool:
        """Whether a request would be run now."""
        return not self.paused and not self.sleep_level and any(one.ready for one in self.replicas)

    def problems(self) -> list[dict[str, Any]]:
        """Of all replicas; empty when every rank answers."""
        return [problem for one in self.replicas for problem in one.problems()]

    def pids(self) -> list[int]:
        """Every process on this host below the engine's."""
        return [pid for one in self.replicas for pid in (one.pid, *(rank.pid for rank in one.ranks)) if pid]


class RequestInfo(msgspec.Struct, kw_only=True, frozen=True):
    """A request that has not ended."""

    request_id: str  # the engine's name for it
    external_id: str = ""  # of the HTTP request that it is of (X-Request-Id)
    response_id: str = ""  # of the response that it is for
    age_s: float  # since it arrived
    prompt_tokens: int
    output_tokens: int
    state: str  # waiting or running
    replica: int | None  # None: no replica has it now


def own_process() -> tuple[int, int]:
    """(pid, birth) of this process."""
    return os.getpid(), procs.birth(os.getpid())


@dataclass
class _Entry:
    pulse: wire.Pulse | None = None
    heard_s: float = field(default_factory=time.monotonic)
    lost: ExecutorError | None = None


class HealthBook:
    """What each replica last said of itself. Written by the router."""

    def __init__(self, replicas: int, first: int = 0) -> None:
        """first: the number of the first of them."""
        self._entries, self._first = [_Entry() for _ in range(replicas)], first
        self._process = own_process()

    def heard(self, replica: int, pulse: wire.Pulse) -> None:
        """It said how it is."""
        entry = self._entries[replica]
        entry.pulse, entry.heard_s = pulse, time.monotonic()

    def ready(self, replica: int) -> None:
        """It takes requests (again)."""
        self._entries[replica] = _Entry()

    def lost(self, replica: int, error: ExecutorError) -> None:
        """It is gone."""
        entry = self._entries[replica]
        entry.pulse, entry.lost = None, error

    def ranks(self, replica: int) -> list[RankHealth]:
        """As it last said."""
        pulse = self._entries[replica].pulse
        return [] if pulse is None else pulse.ranks

    def report(self, supervisor: Supervisor, pids: list[int], paused: bool, sleep_level: int) -> EngineHealth:
        """All of it now."""
        now_s, found = time.monotonic(), []
        for i, (entry, life) in enumerate(zip(self._entries, supervisor.lives, strict=True)):
            pulse, lost = entry.pulse, entry.lost
            found.append(
                ReplicaHealth(
                    replica=self._first + i,
                    state=life.state.value,
                    for_s=now_s - life.since_s,
                    pid=pids[i],
                    restarts=life.starts - 1,
                    silent_s=now_s - entry.heard_s,
                    ranks=[] if pulse is None else pulse.ranks,
                    stats=None if pulse is None else pulse.report.stats,
                    lost_why="" if lost is None else str(lost).partition("\n")[0],
                    lost_rank=None if lost is None else lost.rank,
                    lost_phase="" if lost is None else lost.phase,
                    lost_kind="" if lost is None else lost.kind,
                    incident="" if lost is None else lost.incident,
                )
            )
        return EngineHealth(pid=self._process[0], born=self._process[1], replicas=found, paused=paused, sleep_level=sleep_level)


def stopped(handle: ReplicaHandle, ranks: list[RankHealth], stack: list[str]) -> ExecutorError:
    """A replica's process that was stopped by a signal. A replica of one rank is that rank. stack: its Python stack."""
    alone = ranks[0] if len(ranks) == 1 and ranks[0].pid == handle.pid else None
    at = f" in {alone.where}" if alone is not None else ""
    quiet_s = time.monotonic() - handle.spoke_s
    message = f"{handle.name} (pid {handle.pid}) was stopped (SIGSTOP, or a debugger){at}: no sign of life for {quiet_s:.1f} s."
    rank, phase = (alone.rank, alone.phase) if alone is not None else (None, "")
    return ExecutorError(message, rank=rank, phase=phase, kind="stopped", log_tail=stack, ranks=ranks)
