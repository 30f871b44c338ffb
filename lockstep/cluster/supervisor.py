"""The life of replicas as one state machine: what failure handling knows, and the only place that knows it.

    state        event       next         meaning
    STARTING     ready       READY        takes requests
    STARTING     failed      WAITING      or GIVEN_UP after `most_failures` in a row
    READY        failed      WAITING      its requests are replayed elsewhere
    STARTING     absent      WAITING      hosts of it did not come in time; GIVEN_UP if no replica took requests meanwhile
    WAITING      due         STARTING     the router starts it anew
    any          stop        STOPPED      for good

The pause before a new start doubles with each failure in a row; a replica that brings tokens starts counting anew, for then
it can run. (A request that kills whoever runs it is given up by the router.) Later causes of failure (hangs, lost nodes, lost
heartbeats) are all `failed`. No process, no clock: time is handed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

MOST_DOUBLINGS = 64  # more have no number: who is never given up may fail for days
HEALTHY_S = 600.0  # who was up for so long can run, also where nobody asked anything of it


class State(Enum):
    """Where a replica is in its life."""

    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting"  # for its next start
    GIVEN_UP = "given up"
    STOPPED = "stopped"


@dataclass(frozen=True)
class RestartPolicy:
    """first_s: pause after the first failure, growing by `factor` up to `most_s` seconds. most_failures: in a row, then no more."""

    first_s: float = 0.25
    factor: float = 2.0
    most_s: float = 30.0
    most_failures: int = 8

    def pause_s(self, failures: int) -> float:
        """How long to wait after so many failures in a row (at least 1)."""
        return min(self.most_s, self.first_s * self.factor ** min(failures - 1, MOST_DOUBLINGS))


@dataclass
class Life:
    """One replica's. Written by its Supervisor only."""

    state: State = State.STARTING
    failures: int = 0  # in a row
    starts: int = 1
    since_s: float = 0.0  # when it came into this state
    due_s: float = 0.0  # WAITING: when to start it


class Supervisor:
    """The lives of all replicas. All times are of one monotonic clock, in seconds."""

    def __init__(self, replicas: int, policy: RestartPolicy | None = None, now_s: float = 0.0) -> None:
        self.policy = policy or RestartPolicy()
        self.lives = [Life(since_s=now_s) for _ in range(replicas)]
        self._none_ready_s: float | None = now_s  # since when; None while one is

    def ready(self, replica: int, now_s: float) -> None:
        """It says that it takes requests."""
        life = self.lives[replica]
        assert life.state is State.STARTING, f"replica {replica} is ready while {life.state.value}"
        life.state, life.since_s = State.READY, now_s
        self._none_ready_s = None

    def worked(self, replica: int) -> None:
        """It brought tokens."""
        self.lives[replica].failures = 0

    def failed(self, replica: int, now_s: float) -> State:
        """It is gone, or must be taken for gone. Its state now: WAITING or GIVEN_UP. Ignored where it was gone already."""
        life = self.lives[replica]
        if life.state not in (State.STARTING, State.READY):
            return life.state
        if life.state is State.READY and now_s - life.since_s >= HEALTHY_S:
            life.failures = 0
        life.failures += 1
        life.since_s = now_s
        life.state = State.GIVEN_UP if life.failures >= self.policy.most_failures else State.WAITING
        life.due_s = now_s + self.policy.pause_s(life.failures)
        if self._none_ready_s is None and not any(other.state is State.READY for other in self.lives):
            self._none_ready_s = now_s
        return life.state

    def absent(self, replica: int, now_s: float) -> State:
        """Hosts of it did not come for as long as they may take. Its state now: WAITING or GIVEN_UP.

        That is no failure of its own: while others take requests it waits for them anew, as long as it takes.
        """
        life = self.lives[replica]
        assert life.state is State.STARTING, f"hosts of replica {replica} are awaited while it is {life.state.value}"
        life.state = State.GIVEN_UP if self.stranded_s(now_s) >= now_s - life.since_s else State.WAITING
        life.since_s = life.due_s = now_s
        return life.state

    def due(self, now_s: float) -> list[int]:
        """The replicas to start now; they are STARTING from here on."""
        found = [i for i, life in enumerate(self.lives) if life.state is State.WAITING and life.due_s <= now_s]
        for i in found:
            life = self.lives[i]
            life.state, life.since_s = State.STARTING, now_s
            life.starts += 1
        return found

    def next_due_s(self) -> float | None:
        """When the next replica is to be started; None when none waits."""
        return min((life.due_s for life in self.lives if life.state is State.WAITING), default=None)

    def stop(self) -> None:
        """No replica is started any more."""
        for life in self.lives:
            life.state = State.STOPPED

    def stranded_s(self, now_s: float) -> float:
        """For how long no replica has taken requests; 0 while one does."""
        return 0.0 if self._none_ready_s is None else now_s - self._none_ready_s

    @property
    def hopeless(self) -> bool:
        """Whether no replica runs, and none will."""
        return all(life.state in (State.GIVEN_UP, State.STOPPED) for life in self.lives)

    @property
    def repairing(self) -> bool:
        """Whether a replica is on its way back."""
        return any(life.state in (State.STARTING, State.WAITING) for life in self.lives)

    @property
    def restarts(self) -> int:
        """Starts beyond each replica's first."""
        return sum(life.starts - 1 for life in self.lives)
