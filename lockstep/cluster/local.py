"""One engine in this process: the client that adds nothing."""

from __future__ import annotations

import select
import time
from collections.abc import Iterable, Sequence
from typing import Any

from lockstep.cluster.contract import EngineClient
from lockstep.cluster.health import EngineHealth, ReplicaHealth, RequestInfo, own_process
from lockstep.cluster.live import LiveBook, ReplicaNow
from lockstep.engine.core import EngineCore
from lockstep.engine.errors import RequestError
from lockstep.engine.stats import EngineStats
from lockstep.executor.contract import ExecutorError, RankMemory
from lockstep.observability.timeline import Timeline
from lockstep.observability.trace import Profile
from lockstep.protocol import EngineOutput, EngineRequest

LIVE_S = 0.5  # between two reports that are compared, at least
NAP_S = 1.0  # longest wait of a `step` with nothing to do


class LocalClient(EngineClient):
    """See EngineClient. Steps run on the caller's thread."""

    ticks = False

    def __init__(self, core: EngineCore) -> None:
        self.core, self.config, self.memory = core, core.config, core.memory
        self._watched: int | None = None
        self._live, self._reported_s = LiveBook(core.config.parallel, 1), 0.0

    @property
    def failure(self) -> ExecutorError | None:  # type: ignore[override]
        return self.core.failure

    @property
    def timeline(self) -> Timeline:  # type: ignore[override]
        return self.core.executor.timeline

    def check_request(self, request: EngineRequest) -> None:
        wanted, mine = request.data_parallel_rank, self.config.parallel.first_replica
        if wanted not in (None, mine):
            raise RequestError(f"data_parallel_rank={wanted} does not exist: there is one engine here, {mine}. Name it, or none.")
        self.core.check_request(request)

    def add_request(self, request: EngineRequest) -> None:
        self.core.add_request(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        self.core.abort(request_ids)

    def step(self) -> list[EngineOutput]:
        if self._watched is not None and self.core.failure is None and not self.core.has_unfinished():
            select.select([self._watched], [], [], NAP_S)
        return self._numbered(self.core.step())

    def gathered(self) -> list[EngineOutput]:
        return self._numbered(self.core.scheduler.take_outputs())

    def _numbered(self, outputs: list[EngineOutput]) -> list[EngineOutput]:
        for output in outputs:
            output.replica = self.config.parallel.first_replica
        return outputs

    def watch(self, fd: int) -> None:
        self._watched = fd

    def stats(self) -> EngineStats:
        return self.core.stats()

    def live(self) -> list[ReplicaNow]:
        now_s = time.monotonic()
        if now_s - self._reported_s >= LIVE_S:
            self._reported_s = now_s
            self._live.heard(0, self.core.report(), now_s)
        return [self._live.now(0, "ready" if self.failure is None else "stopped", 0, now_s)]

    def ranks(self) -> list[RankMemory]:
        return self.core.executor.memory()

    def collective_rpc(self, method: str, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
        return self.core.executor.collective_rpc(method, args, kwargs)

    def start_profile(self) -> None:
        self.core.executor.start_timelines()

    def stop_profile(self) -> Profile:
        return self.core.executor.take_timelines()

    def health(self) -> EngineHealth:
        pid, born = own_process()
        dead = self.core.failure
        one = ReplicaHealth(
            replica=self.config.parallel.first_replica,
            state="ready" if dead is None else "stopped",
            pid=pid,
            ranks=self.core.executor.health(),
            stats=self.core.stats(),
            lost_why="" if dead is None else str(dead).partition("\n")[0],
        )
        return EngineHealth(pid=pid, born=born, replicas=[one], paused=self.core.paused, sleep_level=self.core.sleep_level)

    def requests(self) -> list[RequestInfo]:
        now_s, replica = time.monotonic(), self.config.parallel.first_replica
        scheduler = self.core.scheduler
        return [
            RequestInfo(
                request_id=request.request_id,
                age_s=max(0.0, now_s - request.key[1]),
                prompt_tokens=request.num_prompt,
                output_tokens=request.num_output,
                state=state,
                replica=replica,
            )
            for state, queue in (("running", scheduler.running), ("waiting", scheduler.waiting))
            for request in queue.items
        ]

    def pause(self) -> None:
        self.core.pause()

    def resume(self) -> None:
        self.core.resume()

    def sleep(self, level: int = 1) -> None:
        self.core.sleep(level)

    def wake_up(self) -> None:
        self.core.wake_up()

    def reset_prefix_cache(self) -> None:
        self.core.reset_prefix_cache()

    def shutdown(self) -> None:
        self.core.shutdown()
