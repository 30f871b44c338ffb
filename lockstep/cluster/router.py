"""Data parallelism: one engine client made of many. Requests go to the replica that suits them, and outlive it.

A request is known here by its prompt and the tokens that have come. When its replica dies, both are given to another (or to the
same one when it is back): the engine goes on from there as after a preemption, and since answers do not depend on the batch,
the tokens that follow are those that would have followed. The caller sees nothing but a pause.

Replicas are the fleet's, here or on other hosts; who is alive and when to start whom is the supervisor's to know; what a replica
carries is the load book's; where a request goes is `placement`'s. This file only moves requests between them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from lockstep.cluster import wire
from lockstep.cluster.fleet import Fleet, Lost
from lockstep.cluster.health import HealthBook
from lockstep.cluster.incident import facts
from lockstep.cluster.live import LiveBook, Recoveries, ReplicaNow
from lockstep.cluster.load_book import LoadBook
from lockstep.cluster.operate import Mode, Operated
from lockstep.cluster.placement import Placement
from lockstep.cluster.supervisor import RestartPolicy, State
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.engine.admission import Limits, check_request
from lockstep.engine.core import limits_of
from lockstep.engine.errors import RequestError
from lockstep.engine.stats import EngineStats, combined
from lockstep.executor.contract import ExecutorError, RankMemory
from lockstep.observability.flight_recorder import FlightRecorder
from lockstep.observability.logging import get_logger
from lockstep.observability.timeline import Timeline
from lockstep.protocol import EngineOutput, EngineRequest, FinishReason
from lockstep.utils.words import counted, joined

MOST_REPLAYS = 5  # of one request: if every replica that takes it dies, it is the cause
NAP_S = 0.25  # longest wait of one `step`
CALL_S = 300.0
REPAIR_S = 20.0  # so long after a replica was lost, a call of all of them waits for it

_log = get_logger(__name__)


@dataclass
class _Live:
    """A request that has not ended."""

    request: EngineRequest
    tokens: list[int] = field(default_factory=list)  # that have come
    replica: int = -1  # where it runs; -1: nowhere now
    alias: str = ""  # what it is called there: a new name for each placement, so that nothing late is taken for its own
    replays: int = 0
    lost_s: float = 0.0  # when its replica died; 0: it has gone on since

    def resumed(self) -> EngineRequest:
        """The request as a replica gets it now."""
        return msgspec.structs.replace(self.request, request_id=self.alias, output_token_ids=list(self.tokens))


class DataParallelClient(Operated):
    """See EngineClient. Of `config.parallel.replicas_served` replicas, each a process of its own with its ranks, it starts those
    of this host and waits for the others."""

    def __init__(
        self, config: EngineConfig, spec: ModelSpec, folder: Path, *, policy: RestartPolicy | None = None, replaced: bool = False
    ) -> None:
        """Raises ConfigError or ExecutorError when a replica does not start, or does not come in startup_timeout_seconds.

        replaced: this process is followed by another then.
        """
        self._config, self._spec = config, spec
        count, self._first = config.parallel.replicas_served, config.parallel.first_replica
        self.timeline, self.failure, self._recording = Timeline(), None, False
        self.book, self.mode, self.flight = LoadBook(count), Mode(), FlightRecorder("engine")
        self.health_book = HealthBook(count, self._first)
        self._reports = LiveBook(config.parallel, count)
        self.flight.listen()
        self.recoveries_s: list[float] = []  # of each request that went on elsewhere: from the loss to its next token
        self._returns_s: list[float] = []  # of each replica that came back
        self._placement = Placement(config)
        self._live: dict[str, _Live] = {}
        self._aliases: dict[str, str] = {}  # alias -> request id
        self._placed = 0
        self._homeless: dict[str, None] = {}  # requests that no replica can take now
        self._outputs: list[EngineOutput] = []
        self._answers: dict[int, wire.Answer | wire.Refused | None] = {}  # of calls that are waited for
        self._calls = 0
        self._watched = False
        self._limits: Limits | None = None  # once a replica has said how large its cache is
        self._lost_since: dict[int, float] = {}  # replica -> when it was lost, until it is back
        for i in range(count):
            self.book.set_routable(i, False)
        self._fleet = Fleet(config, spec, folder, policy, replaced=replaced)
        self.supervisor = self._fleet.supervisor
        try:
            self._await_all()
        except BaseException:
            self.shutdown()
            raise

    # --- requests ---

    def check_request(self, request: EngineRequest) -> None:
        self._raise_failure()
        assert self._limits is not None
        check_request(request, self._limits)
        self._placement.check(request, self.book.loads)

    def add_request(self, request: EngineRequest) -> None:
        self._raise_failure()
        if not self._live:
            self._pump(0.0)  # who died while nobody looked must not be chosen
        if request.request_id in self._live or any(o.request_id == request.request_id for o in self._outputs):
            raise RequestError(f"request id {request.request_id!r} is in use by an unfinished request: choose another id.")
        try:
            self.check_request(request)
        except RequestError as e:
            raise RequestError(f"request {request.request_id!r}: {e}") from None
        self._live[request.request_id] = _Live(request, list(request.output_token_ids))
        self._place(request.request_id)

    def abort(self, request_ids: Iterable[str]) -> None:
        for name in request_ids:
            live = self._live.get(name)
            if live is not None:  # ended here and now: what its replica still says of it, or whether it dies, is all the same
                self._end(name, "abort", live.replica)
                if live.replica >= 0:
                    self._fleet.send(live.replica, wire.Abort([live.alias]))

    def gathered(self) -> list[EngineOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def step(self) -> list[EngineOutput]:
        if self.failure is not None and not self._outputs:
            raise self.failure
        if not self._outputs:
            self._pump(NAP_S if self._live or self.supervisor.repairing or self._watched else 0.0)
        return self.gathered()

    def watch(self, fd: int) -> None:
        self._watched = True
        self._fleet.watch(fd)

    def _place(self, name: str) -> None:
        """Send a request to a replica, or keep it until there is one."""
        live = self._live[name]
        loads = self.book.loads
        if not any(load.routable for load in loads):
            self._homeless[name] = None
            return
        known = live.request.prompt_token_ids + live.tokens
        replica = self._placement.choose(live.request, known, loads, again=live.replays > 0)
        # No guess at tokens to come: most requests name a limit that they never reach.
        ticket = self.book.start(name, replica, len(known))
        self._placed += 1
        live.replica, live.alias = replica, f"{self._placed}:{name}"
        self._aliases[live.alias] = name
        self._fleet.send(replica, wire.Add(live.resumed(), ticket))

    def _take(self, output: EngineOutput) -> None:
        """An output has come: count it, pass it on."""
        name = self._aliases.get(output.request_id)
        if name is None:
            return  # aborted here while it was on its way
        live = self._live[name]
        output.request_id, output.replica = name, self._first + live.replica
        if output.new_token_ids:
            live.tokens += output.new_token_ids
            if live.lost_s:
                self.recoveries_s.append(time.monotonic() - live.lost_s)
                live.lost_s = 0.0
        if output.finish_reason is not None:
            self._finish(output.request_id)
        else:
            self.book.progress(output.request_id, len(live.request.prompt_token_ids), len(live.tokens))
        self._outputs.append(output)

    def _finish(self, name: str) -> None:
        live = self._live.pop(name)
        self._aliases.pop(live.alias, None)
        self.book.finish(name, len(live.tokens))
        self._homeless.pop(name, None)

    # --- replicas ---

    def _await_all(self) -> None:
        """Until every replica is ready; the first that fails, or that is given up, ends it."""
        lives = self.supervisor.lives
        deadline = time.monotonic() + self._config.start_limit_s
        while any(life.state is not State.READY for life in lives):
            if time.monotonic() > deadline or any(life.state is State.GIVEN_UP for life in lives):
                raise ExecutorError(self._fleet.late(), phase="start", kind="hung")
            self._pump(0.2)

    def _pump(self, timeout_s: float) -> None:
        """Sleep until a replica has something to say, one is to be started, or `timeout_s` has passed; handle all there is."""
        for event in self._fleet.pump(timeout_s):
            if isinstance(event, Lost):
                self._lost(event)
            else:
                self._hear(event.replica, event.reply)
        limit_s = self._config.start_limit_s
        for event in self._fleet.condemn([load.replica for load in self.book.loads if load.requests]):
            assert isinstance(event, Lost)
            self._lost(event)
        self.tick()
        if self._live and self.supervisor.stranded_s(time.monotonic()) > limit_s:
            self._fail(
                ExecutorError(f"no replica has taken requests for {limit_s:g} s (see startup_timeout_seconds). {self._fleet.late()}")
            )

    def _hear(self, replica: int, reply: wire.Reply) -> None:
        if isinstance(reply, wire.News):
            if reply.outputs:
                self._fleet.supervisor.worked(replica)
            for output in reply.outputs:
                self._take(output)
            if (load := reply.load) is not None:
                self.book.reconcile(replica, load.waiting_tokens, load.running_tokens, load.requests, reply.ticket)
        elif isinstance(reply, wire.Pulse):
            self.health_book.heard(replica, reply)
            self._reports.heard(replica, reply.report)
        elif isinstance(reply, wire.Ready):
            self._ready(replica, reply)
        elif isinstance(reply, wire.Answer | wire.Refused) and reply.id in self._answers:
            self._answers[reply.id] = reply

    def _ready(self, replica: int, reply: wire.Ready) -> None:
        """A replica takes requests. The smallest cache of all bounds what is accepted: any replica may have to take it over."""
        now_s = time.monotonic()
        if self._limits is None or reply.memory.num_blocks < self._limits.num_blocks:
            self.memory, self.config = reply.memory, replace(reply.config, parallel=self._config.parallel)
            self._limits = limits_of(self.config, self._spec, self.memory)
        lost_s = self._lost_since.pop(replica, None)
        if lost_s is not None:
            self._returns_s.append(now_s - lost_s)
            _log.warning("replica %d is back, %.2f s after it was lost", self._first + replica, now_s - lost_s)
        self.health_book.ready(replica)
        self.flight.event("replica ready", replica=self._first + replica)
        for order in self.mode.orders():
            self._fleet.send(replica, order)
        self.book.set_routable(replica, True)
        homeless, self._homeless = self._homeless, {}
        for name in homeless:
            self._place(name)

    def _lost(self, event: Lost) -> None:
        """A replica is gone: its requests go elsewhere."""
        now_s, replica = time.monotonic(), event.replica
        self._lost_since.setdefault(replica, now_s)
        if not event.error.incident:  # it could not say anything itself
            about = {"culprit": "replica", "culprit_replica": self._first + replica, **facts(event.error)}
            event.error.incident = self.flight.dump(self._config.runtime.incident_dir, about)
            event.error.args = (f"{event.error}\nThe whole story: {event.error.incident}",)
        self.health_book.lost(replica, event.error)
        self.flight.event("replica lost", replica=self._first + replica, kind=event.error.kind, incident=event.error.incident)
        self.book.set_routable(replica, False)
        if self._given_up(replica):
            self.book.give_up(replica)
        self.book.forget(replica)
        self._placement.forget(replica)
        self._reports.lost(replica)
        mine = [name for name, live in self._live.items() if live.replica == replica]
        _log.warning("%s", joined(str(event.error), self._then(len(mine), event.then)))
        if self.supervisor.hopeless:
            self._fail(event.error)
            return
        for name in mine:
            self._replay(name, now_s, event.error)

    def _then(self, count: int, then: str) -> str:
        """What becomes of a lost replica and of so many requests that it ran, in words."""
        if not count or self.supervisor.hopeless:
            return f"{then}."
        elsewhere = any(life.state is State.READY for life in self.supervisor.lives)
        verb = ("go" if elsewhere else "wait") + ("" if count > 1 else "es" if elsewhere else "s")
        return f"{counted(count, 'request')} {verb} {'on elsewhere' if elsewhere else 'for a replica'}; {then}."

    def _replay(self, name: str, now_s: float, error: ExecutorError) -> None:
        live = self._live[name]
        self._aliases.pop(live.alias, None)
        last, live.replica, live.replays, live.lost_s = live.replica, -1, live.replays + 1, live.lost_s or now_s
        if live.replays > MOST_REPLAYS:
            message = f"request {name!r} was given up: {live.replays} replicas died while they ran it; the last one: {error}"
            self._end(name, "error", last, message)
        else:
            self._place(name)

    def _fail(self, error: ExecutorError) -> None:
        """Nothing runs any more, and nothing will: every request ends with the error."""
        self.failure = error
        for name, live in list(self._live.items()):
            self._end(name, "error", live.replica, str(error))

    def _end(self, name: str, why: FinishReason, at: int, error: str | None = None) -> None:
        """End a request from here. at: the replica that ran it; where none did (-1), it counts as the first one's."""
        self._finish(name)
        number = self._first + max(0, at)
        self._outputs.append(EngineOutput(request_id=name, new_token_ids=[], finish_reason=why, error=error, replica=number))

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    # --- all replicas at once ---

    def _call(self, method: str, *args: Any, skip_lost: bool = False) -> list[tuple[int, Any]]:
        """Call a method of every replica's engine: (its number, answer) of each that is not given up.

        skip_lost: do without those that are down, or die meanwhile. Else they are waited for up to REPAIR_S after their loss, and
        ExecutorError names who is missing.
        """
        self._raise_failure()
        self._pump(0.0)
        if not skip_lost:
            self._await_repair(method)
        asked: list[tuple[int, int]] = []  # (replica, call)
        for replica, life in enumerate(self.supervisor.lives):
            if life.state is State.READY:
                self._calls += 1
                asked.append((replica, self._calls))
                self._answers[self._calls] = None
                self._fleet.send(replica, wire.Call(self._calls, method, list(args)))
        deadline = time.monotonic() + CALL_S
        starts = {replica: self.supervisor.lives[replica].starts for replica, _ in asked}
        found = []
        try:
            for replica, number in asked:
                life, shown = self.supervisor.lives[replica], self._first + replica
                while self._answers[number] is None and life.state is State.READY and life.starts == starts[replica]:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"replica {shown} did not answer the call of {method} in {CALL_S:g} s")
                    self._pump(0.1)
                answer = self._answers[number]
                if isinstance(answer, wire.Refused):
                    raise ExecutorError(f"replica {shown}: {answer.message}", kind="raised")
                if answer is not None:
                    found.append((shown, answer.value))
                elif not skip_lost:
                    raise ExecutorError(f"replica {shown} was lost during the call of {method}: call again.", kind="died")
        finally:
            for _, number in asked:
                self._answers.pop(number, None)
        return found

    def _await_repair(self, method: str) -> None:
        """Until every replica that is not given up is ready. Raises ExecutorError when one has been away for too long."""
        while self.supervisor.repairing:
            now_s = time.monotonic()
            since = self._lost_since.items()
            late = [self._first + replica for replica, lost_s in since if now_s - lost_s > REPAIR_S and not self._given_up(replica)]
            if late:
                raise ExecutorError(
                    f"{method} is for every replica, and {late} have not come back in {REPAIR_S:g} s: call again when they have.",
                    kind="died",
                )
            self._pump(0.1)
            self._raise_failure()

    def _given_up(self, replica: int) -> bool:
        return self.supervisor.lives[replica].state is State.GIVEN_UP

    def _requests(self) -> dict[str, tuple[EngineRequest, int, int]]:
        shown = {name: self._first + live.replica if live.replica >= 0 else -1 for name, live in self._live.items()}
        return {name: (live.request, len(live.tokens), shown[name]) for name, live in self._live.items()}

    def stats(self) -> EngineStats:
        return combined([msgspec.msgpack.decode(v, type=EngineStats) for _, v in self._call("stats", skip_lost=True)])

    def live(self) -> list[ReplicaNow]:
        lives = enumerate(self.supervisor.lives)
        return [self._reports.now(replica, life.state.value, life.starts - 1) for replica, life in lives]

    def recoveries(self) -> Recoveries:
        return Recoveries(self.recoveries_s, self._returns_s)

    def ranks(self) -> list[RankMemory]:
        found = [(replica, msgspec.msgpack.decode(v, type=list[RankMemory])) for replica, v in self._call("ranks", skip_lost=True)]
        return [msgspec.structs.replace(rank, replica=replica) for replica, ranks in found for rank in ranks]

    def collective_rpc(self, method: str, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
        answers = self._call("collective_rpc", method, list(args), kwargs)
        return [value for _, v in answers for value in msgspec.msgpack.decode(v)]

    def pids(self) -> list[int]:
        """The process of each replica; 0 for one that does not run now, or not on this host."""
        return self._fleet.pids()

    def shutdown(self) -> None:
        if self.failure is None:
            self._fail(ExecutorError("the engine has been shut down: make a new one.", kind="shutdown"))
        self._fleet.close()
