"""What operators ask of all replicas at once: stand still, sleep, wake up, forget cached prefixes; and how they are.

What was asked last is remembered: a replica that starts meanwhile is brought to it before it gets a request.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from lockstep.cluster import wire
from lockstep.cluster.contract import EngineClient
from lockstep.cluster.fleet import Fleet
from lockstep.cluster.health import EngineHealth, HealthBook, RequestInfo
from lockstep.cluster.placement import Placement
from lockstep.observability.trace import Profile
from lockstep.protocol import EngineRequest

SLEEP_LEVELS = (1, 2)


@dataclass(frozen=True)
class Mode:
    """How all replicas are to be."""

    paused: bool = False
    sleep_level: int = 0

    def orders(self) -> list[wire.Call]:
        """What brings a fresh replica there. Nobody waits for the answers (number 0)."""
        if self.sleep_level:
            return [wire.Call(0, "sleep", [self.sleep_level])]
        return [wire.Call(0, "pause", [])] if self.paused else []


class Operated(EngineClient):
    """The operators' half of the router."""

    mode: Mode
    _recording: bool  # a profile
    health_book: HealthBook
    _fleet: Fleet
    _placement: Placement

    @abstractmethod
    def _call(self, method: str, *args: Any, skip_lost: bool = False) -> list[tuple[int, Any]]: ...

    @abstractmethod
    def _requests(self) -> Mapping[str, tuple[EngineRequest, int, int]]:
        """Request id -> (request, tokens that have come, its replica's number or -1) of those that have not ended."""

    def health(self) -> EngineHealth:
        return self.health_book.report(self._fleet.supervisor, self._fleet.pids(), self.mode.paused, self.mode.sleep_level)

    def requests(self) -> list[RequestInfo]:
        now_s = time.monotonic()
        found = [
            RequestInfo(
                request_id=name,
                external_id=request.external_id,
                response_id=request.response_id,
                age_s=max(0.0, now_s - request.arrival_s) if request.arrival_s else 0.0,
                prompt_tokens=len(request.prompt_token_ids),
                output_tokens=tokens,
                state="running" if tokens and replica >= 0 else "waiting",
                replica=None if replica < 0 else replica,
            )
            for name, (request, tokens, replica) in self._requests().items()
        ]
        return sorted(found, key=lambda info: -info.age_s)

    def pause(self) -> None:
        self.mode = replace(self.mode, paused=True)
        self._call("pause", skip_lost=True)

    def resume(self) -> None:
        if self.mode.sleep_level:
            raise ValueError(f"the engine sleeps (level {self.mode.sleep_level}): wake it up instead.")
        self.mode = Mode()
        self._call("resume", skip_lost=True)

    def sleep(self, level: int = 1) -> None:
        if level not in SLEEP_LEVELS:
            raise ValueError(f"level={level} does not exist: 1 gives the KV cache's memory back, 2 the weights' too.")
        if self.mode.sleep_level not in (0, level):
            raise ValueError(f"the engine sleeps already (level {self.mode.sleep_level}): wake it up first.")
        self.mode = Mode(paused=True, sleep_level=level)
        self._call("sleep", level, skip_lost=True)
        self._forget_prefixes()

    def wake_up(self) -> None:
        if not self.mode.sleep_level:
            return
        self.mode = Mode()
        self._call("wake_up", skip_lost=True)

    def reset_prefix_cache(self) -> None:
        self._call("reset_prefix_cache", skip_lost=True)
        self._forget_prefixes()

    def start_profile(self) -> None:
        if self._recording:
            raise ValueError("a profile is being recorded already: stop it first.")
        self._call("start_profile")
        self._recording = True

    def stop_profile(self) -> Profile:
        if not self._recording:
            raise ValueError("no profile is being recorded: start one first.")
        found = [(replica, msgspec.msgpack.decode(v, type=Profile).tracks) for replica, v in self._call("stop_profile")]
        self._recording = False
        return Profile([replace(t, name=f"replica {replica} {t.name}") for replica, tracks in found for t in tracks])

    def _forget_prefixes(self) -> None:
        for replica in range(len(self._fleet.supervisor.lives)):
            self._placement.forget(replica)
