"""What the frontend asks of whatever runs requests: one engine here, or many behind a router."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lockstep.cluster.health import EngineHealth, RequestInfo
from lockstep.cluster.live import Recoveries, ReplicaNow
from lockstep.config.tree import EngineConfig
from lockstep.engine.sizing import MemoryPlan
from lockstep.engine.stats import EngineStats
from lockstep.executor.contract import ExecutorError, RankMemory
from lockstep.observability.timeline import Timeline
from lockstep.observability.trace import Profile
from lockstep.protocol import EngineOutput, EngineRequest


class EngineClient(ABC):
    """Requests in, outputs out. Not thread-safe: one thread calls it.

    Every request that was accepted ends in exactly one output with a finish_reason, whatever dies meanwhile. When nothing
    can run any more, the `step` that meets it ends all requests with "error" and `failure` is set; `add_request` and
    later steps raise it.
    """

    config: EngineConfig  # with every None filled in
    memory: MemoryPlan
    failure: ExecutorError | None
    timeline: Timeline  # of this process
    tick: Callable[[], None] = staticmethod(lambda: None)  # called in every wait, at least a few times a second where `ticks`
    ticks: bool = True  # False: a `step` takes as long as it takes; `health` may be asked from another thread meanwhile

    @abstractmethod
    def check_request(self, request: EngineRequest) -> None:
        """Raise RequestError (which does not name the request) when it can never run."""

    @abstractmethod
    def add_request(self, request: EngineRequest) -> None:
        """Queue a request. Raises RequestError, and nothing is queued, when it can never run or its id is in use."""

    @abstractmethod
    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests; later steps return their terminal outputs. Unknown ids are ignored."""

    @abstractmethod
    def step(self) -> list[EngineOutput]:
        """Wait for news of requests and return it; [] when there is nothing to wait for, or after a moment without any."""

    def gathered(self) -> list[EngineOutput]:
        """What came while something else than `step` waited, for a `tick` to pass on at once; no later step returns it again."""
        return []

    @abstractmethod
    def watch(self, fd: int) -> None:
        """From now on a `step` that has nothing to do waits, up to a second, and any wait of `step` ends once `fd` is readable.

        (A step of an engine in this process is not cut short.) For a loop that also has to hear something else.
        """

    @abstractmethod
    def stats(self) -> EngineStats:
        """The numbers of this moment, of all replicas together."""

    def live(self) -> list[ReplicaNow]:
        """Every replica and its ranks, as last reported: nobody is asked, no step waits. [] where that is not known."""
        return []

    def recoveries(self) -> Recoveries:
        """What became of losses so far."""
        return Recoveries()

    @abstractmethod
    def ranks(self) -> list[RankMemory]:
        """Every rank's memory, replica by replica."""

    @abstractmethod
    def collective_rpc(self, method: str, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
        """Call a method of `Worker` by name on every rank of every replica; the results, replica by replica.

        A replica that was lost a moment ago is waited for; one that was given up is left out. Raises ExecutorError when one has been
        away for longer, or is lost meanwhile: some ranks may have done it then.
        """

    @abstractmethod
    def start_profile(self) -> None:
        """Record what engines and ranks do from now on."""

    @abstractmethod
    def stop_profile(self) -> Profile:
        """What was recorded since the start."""

    @abstractmethod
    def health(self) -> EngineHealth:
        """How every rank of every replica is, as far as it is known here. Waits for nothing."""

    @abstractmethod
    def requests(self) -> list[RequestInfo]:
        """The requests that have not ended, oldest first."""

    @abstractmethod
    def pause(self) -> None:
        """Plan no more steps: requests keep what they have, and new ones wait. May be called twice."""

    @abstractmethod
    def resume(self) -> None:
        """Go on. Raises ValueError while it sleeps."""

    @abstractmethod
    def sleep(self, level: int = 1) -> None:
        """Pause, and give memory back: of the KV cache (level 1), and of the weights too (level 2). Cached prefixes are forgotten.

        Raises ValueError for another level, or when it sleeps at another one.
        """

    @abstractmethod
    def wake_up(self) -> None:
        """Take the memory again and go on: requests go on with the tokens that would have come."""

    @abstractmethod
    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix."""

    @abstractmethod
    def shutdown(self) -> None:
        """Stop everything. Never raises, may be called twice."""
