"""Data parallelism: one engine client made of many. Requests go to the replica that suits them, and outlive it.

A request is known here by its prompt and the tokens that have come. When its replica dies, both are given to another (or to the
same one when it is back): the engine goes on from there as after a preemption, and since answers do not depend on the batch,
the tokens that follow are those that would have followed. The caller sees nothing but a pause.

Who is alive and when to start whom is the supervisor's to know; what a replica carries is the load book's; where a request goes
is a function of `balance`. This file only moves messages between them.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from lockstep.cluster import balance, wire
from lockstep.cluster.contract import EngineClient
from lockstep.cluster.load_book import LoadBook
from lockstep.cluster.prefix_index import PrefixIndex
from lockstep.cluster.replica import ReplicaProcess
from lockstep.cluster.supervisor import RestartPolicy, State, Supervisor
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.engine.admission import Limits, check_request
from lockstep.engine.core import limits_of
from lockstep.engine.errors import RequestError
from lockstep.engine.stats import EngineStats, combined
from lockstep.executor.contract import ExecutorError, RankMemory
from lockstep.observability.logging import get_logger
from lockstep.observability.timeline import Timeline
from lockstep.observability.trace import Profile
from lockstep.protocol import EngineOutput, EngineRequest

MOST_REPLAYS = 5  # of one request: if every replica that takes it dies, it is the cause
NAP_S = 1.0  # longest wait of one `step`
CALL_S = 300.0

_log = get_logger(__name__)


@dataclass
class _Live:
    """A request that has not ended."""

    request: EngineRequest
    tokens: list[int] = field(default_factory=list)  # that have come
    replica: int = -1  # where it runs; -1: nowhere now
    replays: int = 0
    lost_s: float = 0.0  # when its replica died; 0: it has gone on since

    def resumed(self) -> EngineRequest:
        """The request as a replica gets it now."""
        return msgspec.structs.replace(self.request, output_token_ids=list(self.tokens)) if self.tokens else self.request


class DataParallelClient(EngineClient):
    """See EngineClient. Starts `config.parallel.data_parallel_size` replicas, each a process of its own with its ranks."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, folder: Path, *, policy: RestartPolicy | None = None) -> None:
        """Raises ConfigError or ExecutorError when a replica does not start."""
        self._config, self._spec, self._folder = config, spec, folder
        count = config.parallel.data_parallel_size
        self.timeline, self.failure = Timeline(), None
        self.supervisor = Supervisor(count, policy, time.monotonic())
        self.book = LoadBook(count)
        self.recoveries_s: list[float] = []  # of each request that went on elsewhere: from the loss to its next token
        self._prefixes = PrefixIndex(count)
        self._live: dict[str, _Live] = {}
        self._homeless: list[str] = []  # requests that no replica can take now
        self._outputs: list[EngineOutput] = []
        self._answers: dict[int, wire.Answer | wire.Refused] = {}
        self._calls = self._routed = 0
        self._limits: Limits | None = None  # once a replica has said how large its cache is
        self._lost_since: dict[int, float] = {}  # replica -> when it was lost, until it is back
        self._selector = selectors.DefaultSelector()
        self._death_pipe = os.pipe()
        self._replicas: list[ReplicaProcess | None] = [None] * count
        for i in range(count):
            self.book.set_routable(i, False)
        self._finalizer = weakref.finalize(self, _end_all, self._replicas, self._death_pipe)
        try:
            for i in range(count):
                self._start(i)
            self._await_all()
        except BaseException:
            self.shutdown()
            raise

    # --- requests ---

    def check_request(self, request: EngineRequest) -> None:
        self._raise_failure()
        assert self._limits is not None
        check_request(request, self._limits)

    def add_request(self, request: EngineRequest) -> None:
        self._raise_failure()
        assert self._limits is not None
        if request.request_id in self._live:
            raise RequestError(f"request id {request.request_id!r} is in use by an unfinished request: choose another id.")
        try:
            check_request(request, self._limits)
        except RequestError as e:
            raise RequestError(f"request {request.request_id!r}: {e}") from None
        self._live[request.request_id] = _Live(request)
        self._place(request.request_id)

    def abort(self, request_ids: Iterable[str]) -> None:
        for name in request_ids:
            live = self._live.get(name)
            if live is None:
                continue
            if live.replica < 0:
                self._finish(name)
                self._outputs.append(EngineOutput(request_id=name, new_token_ids=[], finish_reason="abort"))
            else:
                self._send(live.replica, wire.Abort([name]))

    def step(self) -> list[EngineOutput]:
        if self.failure is not None and not self._outputs:
            raise self.failure
        if not self._outputs and (self._live or self.supervisor.repairing):
            self._pump(NAP_S)
        outputs, self._outputs = self._outputs, []
        return outputs

    def _place(self, name: str) -> None:
        """Send a request to a replica, or keep it until there is one."""
        live = self._live[name]
        loads = self.book.loads
        if not any(load.routable for load in loads):
            self._homeless.append(name)
            return
        known = live.request.prompt_token_ids + live.tokens
        self._routed += 1
        replica = self._choose(known, loads)
        # No guess at tokens to come: most requests name a limit that they never reach.
        ticket = self.book.start(name, replica, len(known))
        live.replica = replica
        self._send(replica, wire.Add(live.resumed(), ticket))

    def _choose(self, tokens: Sequence[int], loads: list[balance.ReplicaLoad]) -> int:
        how = self._config.parallel.data_parallel_routing
        if how == "round_robin":
            return balance.round_robin(loads, self._routed)
        if how == "shortest_queue" or not self._config.cache.enable_prefix_caching:
            return balance.shortest_queue(loads, start=self._routed)
        replica = balance.prefix_affine(loads, self._prefixes.matches(tokens), start=self._routed)
        self._prefixes.insert(tokens, replica)
        return replica

    def _take(self, output: EngineOutput) -> None:
        """An output has come: count it, pass it on."""
        live = self._live.get(output.request_id)
        if live is None:
            return  # aborted here while it was on its way
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
        self.book.finish(name, len(live.tokens))
        if name in self._homeless:
            self._homeless.remove(name)

    # --- replicas ---

    def _start(self, replica: int) -> None:
        process = ReplicaProcess(self._config, self._spec, self._folder, replica, self._death_pipe[0])
        self._replicas[replica] = process
        self._selector.register(process, selectors.EVENT_READ, replica)

    def _await_all(self) -> None:
        """Until every replica is ready; the first failure ends it."""
        deadline = time.monotonic() + self._config.runtime.startup_timeout_seconds
        while any(life.state is State.STARTING for life in self.supervisor.lives):
            if time.monotonic() > deadline:
                late = [i for i, life in enumerate(self.supervisor.lives) if life.state is State.STARTING]
                raise ExecutorError(
                    f"replicas {late} were not ready after startup_timeout_seconds={self._config.runtime.startup_timeout_seconds:g}.",
                    phase="start",
                    kind="hung",
                )
            self._pump(0.2)

    def _pump(self, timeout_s: float) -> None:
        """Sleep until a replica has something to say, one is to be started, or `timeout_s` has passed; handle all there is."""
        due = self.supervisor.next_due_s()
        if due is not None:
            timeout_s = max(0.0, min(timeout_s, due - time.monotonic()))
        for key, events in self._selector.select(timeout_s):
            if events & selectors.EVENT_WRITE:
                self._flush(key.data)
            if events & selectors.EVENT_READ:
                self._listen(key.data)
        for replica in self.supervisor.due(time.monotonic()):
            _log.info("replica %d is started again", replica)
            self._start(replica)

    def _listen(self, replica: int) -> None:
        process = self._replicas[replica]
        if process is None:
            return
        try:
            replies = process.channel.receive()
        except (ConnectionError, msgspec.DecodeError):
            self._lost(replica)
            return
        for reply in replies:
            if isinstance(reply, wire.News):
                if reply.outputs:
                    self.supervisor.worked(replica)
                for output in reply.outputs:
                    self._take(output)
                if reply.load is not None:
                    load = reply.load
                    self.book.reconcile(replica, load.waiting_tokens, load.running_tokens, load.requests, reply.ticket)
            elif isinstance(reply, wire.Ready):
                self._ready(replica, reply)
            elif isinstance(reply, wire.Failed):
                process.failed = reply
                self._lost(replica)  # now: ending its ranks takes it a while
                return
            else:
                self._answers[reply.id] = reply

    def _ready(self, replica: int, reply: wire.Ready) -> None:
        """A replica takes requests. The smallest cache of all bounds what is accepted: any replica may have to take it over."""
        now_s = time.monotonic()
        if self._limits is None or reply.memory.num_blocks < self._limits.num_blocks:
            self.memory, self.config = reply.memory, replace(reply.config, parallel=self._config.parallel)
            self._limits = limits_of(self.config, self._spec, self.memory)
        lost_s = self._lost_since.pop(replica, None)
        if lost_s is not None:
            _log.warning("replica %d is back, %.2f s after it was lost", replica, now_s - lost_s)
        self.supervisor.ready(replica, now_s)
        self.book.set_routable(replica, True)
        homeless, self._homeless = self._homeless, []
        for name in homeless:
            self._place(name)

    def _lost(self, replica: int) -> None:
        """A replica is gone: its requests go elsewhere, and it is started again after a pause."""
        process = self._replicas[replica]
        assert process is not None
        now_s, error, life = time.monotonic(), process.error(), self.supervisor.lives[replica]
        self._selector.unregister(process)
        self._replicas[replica] = None
        never_ran = life.state is State.STARTING and life.starts == 1
        state = self.supervisor.failed(replica, now_s)
        self._lost_since.setdefault(replica, now_s)
        self.book.set_routable(replica, False)
        self.book.forget(replica)
        self._prefixes.forget(replica)
        if never_ran:  # for the user to know, not for us to repair
            process.end(ask=False)
            raise ConfigError(str(error)) if error.error_type == "ConfigError" else error
        mine = [name for name, live in self._live.items() if live.replica == replica]
        then = f"it is started again in {life.due_s - now_s:.2f} s" if state is State.WAITING else "it is given up"
        _log.warning("%s %d requests go on elsewhere; %s", error, len(mine), then)
        if self.supervisor.hopeless:
            self._fail(error)
        for name in mine:
            if name in self._live:
                self._replay(name, now_s, error)
        process.end(ask=False)

    def _replay(self, name: str, now_s: float, error: ExecutorError) -> None:
        live = self._live[name]
        live.replica, live.replays, live.lost_s = -1, live.replays + 1, live.lost_s or now_s
        if live.replays > MOST_REPLAYS:
            self._finish(name)
            message = f"request {name!r} was given up: {live.replays} replicas died while they ran it; the last one: {error}"
            self._outputs.append(EngineOutput(request_id=name, new_token_ids=[], finish_reason="error", error=message))
        else:
            self._place(name)

    def _fail(self, error: ExecutorError) -> None:
        """Nothing runs any more, and nothing will: every request ends with the error."""
        self.failure = error
        for name in list(self._live):
            self._finish(name)
            self._outputs.append(EngineOutput(request_id=name, new_token_ids=[], finish_reason="error", error=str(error)))

    def _send(self, replica: int, order: wire.Order) -> None:
        process = self._replicas[replica]
        if process is None:
            return
        with contextlib.suppress(ConnectionError):  # its end is read from the same channel soon
            process.channel.send(wire.encode(order))
            self._watch(replica, process)

    def _flush(self, replica: int) -> None:
        process = self._replicas[replica]
        if process is not None:
            with contextlib.suppress(ConnectionError):
                process.channel.flush()
            self._watch(replica, process)

    def _watch(self, replica: int, process: ReplicaProcess) -> None:
        """Wake up for room to write only while something waits for it."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if process.channel.unsent else 0)
        if self._selector.get_key(process).events != events:
            self._selector.modify(process, events, replica)

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    # --- all replicas at once ---

    def _call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every ready replica's engine; the answers in the replicas' order."""
        self._raise_failure()
        asked: list[tuple[int, int]] = []  # (replica, call)
        for replica, life in enumerate(self.supervisor.lives):
            if life.state is State.READY:
                self._calls += 1
                asked.append((replica, self._calls))
                self._send(replica, wire.Call(self._calls, method, list(args)))
        deadline = time.monotonic() + CALL_S
        found = []
        for replica, number in asked:
            while number not in self._answers:
                if self.supervisor.lives[replica].state is not State.READY:
                    raise ExecutorError(f"replica {replica} was lost during the call of {method}: call again.", kind="died")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"replica {replica} did not answer the call of {method} in {CALL_S:g} s")
                self._pump(0.1)
            answer = self._answers.pop(number)
            if isinstance(answer, wire.Refused):
                raise ExecutorError(f"replica {replica}: {answer.message}", kind="raised")
            found.append(answer.value)
        return found

    def stats(self) -> EngineStats:
        return combined([msgspec.msgpack.decode(v, type=EngineStats) for v in self._call("stats")])

    def ranks(self) -> list[RankMemory]:
        return [rank for v in self._call("ranks") for rank in msgspec.msgpack.decode(v, type=list[RankMemory])]

    def collective_rpc(self, method: str, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
        return [value for v in self._call("collective_rpc", method, list(args), kwargs) for value in msgspec.msgpack.decode(v)]

    def start_profile(self) -> None:
        self._call("start_profile")

    def stop_profile(self) -> Profile:
        found = [msgspec.msgpack.decode(v, type=Profile).tracks for v in self._call("stop_profile")]
        return Profile([replace(t, name=f"replica {i} {t.name}") for i, tracks in enumerate(found) for t in tracks])

    def pids(self) -> list[int]:
        """The process of each replica; 0 for one that does not run now."""
        return [0 if process is None else process.pid for process in self._replicas]

    def shutdown(self) -> None:
        if self.failure is None:
            self._fail(ExecutorError("the engine has been shut down: make a new one.", kind="shutdown"))
        self.supervisor.stop()
        self._finalizer()


def _end_all(replicas: list[ReplicaProcess | None], death_pipe: tuple[int, int]) -> None:
    """End every replica: all are asked first, so that they end at the same time."""
    running = [process for process in replicas if process is not None]
    for process in running:
        process.ask()
    for process in running:
        process.end(ask=True)
    replicas[:] = [None] * len(replicas)
    for fd in death_pipe:
        os.close(fd)
