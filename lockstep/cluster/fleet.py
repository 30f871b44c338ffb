"""All replicas, on this host and on others: started, listened to, lost, started again. Knows nothing of requests.

A replica of this host is a process that is started here. One of another host is a connection that its keeper makes: to start
it is to take the connection. What is the same for both is the supervisor's: who may be started, and when.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.cluster import wire
from lockstep.cluster.doorman import Arrival, Doorman
from lockstep.cluster.greeting import agreed_settings
from lockstep.cluster.health import stopped
from lockstep.cluster.remote import RemoteReplica
from lockstep.cluster.replica import STOP_S, ReplicaHandle, ReplicaProcess
from lockstep.cluster.supervisor import RestartPolicy, State, Supervisor
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.executor.contract import ExecutorError
from lockstep.observability.logging import get_logger
from lockstep.protocol.health import QUIET_S
from lockstep.utils import procs

LOOK_S = 0.5  # how often Ray is asked about actors that have not come
GRACE_S = 20.0  # a replica times its steps itself and knows why one is late: let it speak first
_DOOR, _OUTSIDE = -1, -2  # the selector's keys of the doorman and of what the router's owner listens to, among replicas

if TYPE_CHECKING:
    from lockstep.cluster.ray import ReplicaActors

_log = get_logger(__name__)


@dataclass(frozen=True)
class Said:
    """A replica said something. After `wire.Ready` the supervisor has it as ready."""

    replica: int
    reply: Any


@dataclass(frozen=True)
class Lost:
    """A replica is gone, with all that it ran. then: what is done about it, in words."""

    replica: int
    error: ExecutorError
    then: str


Event = Said | Lost


class Fleet:
    """The replicas behind one router. One thread calls it."""

    def __init__(
        self, config: EngineConfig, spec: ModelSpec, folder: Path, policy: RestartPolicy | None, *, replaced: bool = False
    ) -> None:
        """Start every replica of this host, and wait at the door for the others. Raises ConfigError when there can be no door.

        replaced: should a first start fail, this process is followed by another that tries it anew.
        """
        self._owner = os.getpid()
        actors = None
        if config.parallel.data_parallel_backend == "ray":
            from lockstep.cluster.ray import ReplicaActors

            actors = ReplicaActors(config)
            config = actors.config
        self._config, self._spec, self._folder, self._actors = config, spec, folder, actors
        parallel = config.parallel
        count, self._first = parallel.replicas_served, parallel.first_replica  # here replicas go by index; whoever reads has numbers
        self.supervisor = Supervisor(count, policy, time.monotonic())
        self._doorman = None
        try:
            if parallel.replicas_led < count:
                self._doorman = Doorman(parallel, agreed_settings(config, spec, folder), None if actors is None else actors.key)
        except BaseException:
            if actors is not None:
                actors.close()
            raise
        self._selector = selectors.DefaultSelector()
        self._death_pipe = os.pipe()
        self._replicas: list[ReplicaHandle | None] = [None] * count
        self._waiting: dict[int, Arrival] = {}  # that have come before they may start
        self._causes: dict[int, str] = {}  # of those that are given up
        self._replaced = replaced
        self._look_s = 0.0  # when to ask Ray again
        everything = (self._owner, self._replicas, self._waiting, self._doorman, self._death_pipe, actors)
        self._finalizer = weakref.finalize(self, _end_all, *everything)
        if self._doorman is not None:
            self._selector.register(self._doorman, selectors.EVENT_READ, _DOOR)
        try:
            for replica in range(min(parallel.replicas_led, count)):
                self._start(replica)
            if actors is not None and self._doorman is not None:
                actors.start(spec, folder, self._doorman.host, self._doorman.port)
        except BaseException:
            self.close()
            raise

    def watch(self, fd: int) -> None:
        """`pump` wakes up for this descriptor too; reading it is its owner's."""
        self._selector.register(fd, selectors.EVENT_READ, _OUTSIDE)

    def pids(self) -> list[int]:
        """The process of each replica; 0 for one that does not run now, or not here."""
        return [0 if handle is None else handle.pid for handle in self._replicas]

    def pump(self, timeout_s: float) -> Iterator[Event]:
        """Sleep until a replica has something to say, one is to be started, or `timeout_s` has passed; all there is, in order.

        Take each event before the next one. Raises ConfigError or ExecutorError for a replica that never came up at all.
        """
        due = self.supervisor.next_due_s()
        if due is not None:
            timeout_s = max(0.0, min(timeout_s, due - time.monotonic()))
        for key, events in self._selector.select(timeout_s):
            if key.data == _OUTSIDE:
                continue
            if key.data == _DOOR:
                yield from self._open_door()
                continue
            if events & selectors.EVENT_WRITE:
                self._flush(key.data)
            if events & selectors.EVENT_READ:
                yield from self._listen(key.data)
        yield from self._look_after_actors()
        for replica in self.supervisor.due(time.monotonic()):
            _log.info("replica %d is started again", self._first + replica)
            try:
                self._start(replica)
            except OSError as e:  # no process or descriptor to be had just now
                error = ExecutorError(f"replica {self._first + replica} could not be started: {e}.", phase="start", kind="died")
                yield Lost(replica, error, self._after(replica, self.supervisor.failed(replica, time.monotonic()), error))

    def condemn(self, busy: Sequence[int]) -> Iterator[Event]:
        """End the replicas that have said nothing for longer than they may: while they start, or have work to do (`busy`)."""
        now_s, parallel = time.monotonic(), self._config.parallel
        for replica, life in enumerate(self.supervisor.lives):
            handle = self._replicas[replica]
            if handle is None:
                continue
            if handle.pid and now_s - handle.spoke_s > QUIET_S and procs.state(handle.pid) == "T":
                handle.blame, handle.why = stopped(handle, handle.ranks, handle.stack()), "was stopped"
                yield from self._lose(replica)
                continue
            if life.state is State.STARTING:
                limit_s, what = self._config.start_limit_s, "did not get ready in {:g} s (see startup_timeout_seconds)"
                late = life.starts > 1 and now_s - life.since_s > limit_s
            else:
                limit_s, what = parallel.execute_model_timeout_seconds + GRACE_S, "has requests and said nothing for {:g} s"
                if replica not in busy:
                    handle.heard_s = now_s
                late = now_s - handle.heard_s > limit_s
            if late:
                handle.why = what.format(limit_s)
                yield from self._lose(replica)

    def send(self, replica: int, order: wire.Order) -> None:
        """Send an order, or as much of it as there is room for; the rest follows in `pump`. Lost if the replica is."""
        handle = self._replicas[replica]
        if handle is None:
            return
        with contextlib.suppress(ConnectionError):  # its end is read from the same channel soon
            handle.channel.send(wire.encode(order))
            self._watch(replica, handle)

    def late(self) -> str:
        """Who is not ready, in words, for when it should be; "" when all are."""
        late = [i for i, life in enumerate(self.supervisor.lives) if life.state is not State.READY]
        limit_s = self._config.start_limit_s
        given_up = [self._causes[i] for i in late if i in self._causes]
        if given_up:
            return " ".join(given_up)
        absent = [i for i in late if self._replicas[i] is None]
        if absent and self._actors is not None:
            return f"replicas {absent}, which Ray was to start, have not reported in {limit_s:g} s: {self._actors.words(absent)}."
        if absent and self._doorman is not None:
            return self._doorman.missing(absent, limit_s)
        late = [self._first + i for i in late]
        return f"replicas {late} were not ready after {limit_s:g} s (see startup_timeout_seconds)." if late else ""

    def close(self) -> None:
        """End all of them: those here, and through their keepers those elsewhere. May be called twice, and by a forked child: they
        are not its own."""
        if os.getpid() != self._owner:
            return
        ready = [life.state is State.READY for life in self.supervisor.lives]
        for replica, handle in enumerate(self._replicas):
            if handle is not None:
                handle.listens = ready[replica]
        self.supervisor.stop()
        self._finalizer()
        self._selector.close()

    def _start(self, replica: int) -> None:
        """Start a process, or take the connection of one that has come; without one there is nothing to do until it comes."""
        handle: ReplicaHandle
        if replica < self._config.parallel.replicas_led:
            again = self._replaced or self.supervisor.lives[replica].starts > 1  # a first start that fails is for the user to know
            handle = ReplicaProcess(self._config, self._spec, self._folder, self._first + replica, self._death_pipe[0], again=again)
        elif replica in self._waiting:
            handle = RemoteReplica(self._waiting.pop(replica))
        else:
            if self._actors is not None:
                self._actors.start_again(replica)
            return
        self._replicas[replica] = handle
        self._selector.register(handle, selectors.EVENT_READ, replica)

    def _open_door(self) -> Iterator[Event]:
        """Replicas of other hosts have come: they start now, or when the supervisor lets them."""
        assert self._doorman is not None
        for arrival in self._doorman.arrived():
            replica, handle = arrival.replica, self._replicas[arrival.replica]
            if isinstance(handle, RemoteReplica):  # its keeper, or its host's next one, knows better than we do
                handle.why = "is lost: its host has connected anew"
                yield from self._lose(replica)
            if self.supervisor.lives[replica].state in (State.GIVEN_UP, State.STOPPED):
                arrival.connection.close()
                continue
            before = self._waiting.pop(replica, None)
            if before is not None:
                before.connection.close()
            self._waiting[replica] = arrival
            if self.supervisor.lives[replica].state is State.STARTING:
                self._start(replica)

    def _listen(self, replica: int) -> Iterator[Event]:
        handle = self._replicas[replica]
        if handle is None:
            return
        try:
            replies = handle.channel.receive()
        except ConnectionError:
            yield from self._lose(replica)
            return
        except ValueError as e:
            handle.why = f"said what cannot be decoded ({e})"
            yield from self._lose(replica)
            return
        handle.heard_s = handle.spoke_s = time.monotonic()
        handle.inbox.extend(replies)
        while handle.inbox:  # one by one: who takes them may be interrupted
            reply = handle.inbox.popleft()
            if isinstance(reply, wire.Failed):
                handle.failed = reply
                yield from self._lose(replica)  # now: ending its ranks takes it a while
                return
            if why := self._misplaced(replica, reply):
                handle.why = why
                yield from self._lose(replica)
                return
            if isinstance(reply, wire.Pulse):
                handle.ranks = reply.ranks
            if isinstance(reply, wire.Ready):
                self.supervisor.ready(replica, time.monotonic())
            yield Said(replica, reply)

    def _misplaced(self, replica: int, reply: wire.Reply) -> str:
        """Why this reply cannot be right now, as a predicate; "" when it can. Whatever says so is broken, and replaced."""
        starting = self.supervisor.lives[replica].state is State.STARTING
        if isinstance(reply, wire.Ready) != starting:
            return "said that it is ready when it was" if not starting else f"said {type(reply).__name__} before it was ready"
        load = reply.load if isinstance(reply, wire.News) else None
        if load is not None and min(load.waiting_tokens, load.running_tokens, load.requests) < 0:
            return f"reported a load that cannot be ({load})"
        return ""

    def _look_after_actors(self) -> Iterator[Event]:
        """An actor that has ended brings no replica: a failed start. Where there is a connection, its end tells."""
        now_s = time.monotonic()
        if self._actors is None or now_s < self._look_s:
            return
        self._look_s = now_s + LOOK_S
        for replica, why in self._actors.ended().items():
            life = self.supervisor.lives[replica]
            if life.state is not State.STARTING or self._replicas[replica] is not None:
                continue
            error = ExecutorError(f"replica {replica}, which Ray was to start, did not come: {why}.", phase="start", kind="died")
            if life.starts == 1:
                raise error
            yield Lost(replica, error, self._after(replica, self.supervisor.failed(replica, now_s), error))

    def _after(self, replica: int, state: State, error: ExecutorError) -> str:
        """What is done about a replica that is gone, in words. One that is given up is let in no more."""
        life = self.supervisor.lives[replica]
        absent = error.kind == "absent"
        if state is State.WAITING:
            return "its hosts are waited for anew" if absent else f"it is started again in {life.due_s - life.since_s:.2f} s"
        why = ": " if absent else f" after {life.failures} failures in a row, the last one: "
        cause = f"replica {self._first + replica} was given up{why}{error}"
        self._causes[replica] = cause
        if self._doorman is not None:
            self._doorman.bar(replica, cause)
        return "it is given up"

    def _lose(self, replica: int) -> Iterator[Event]:
        """A replica is gone: it is started again after a pause, or given up. One that never ran is for the user to know."""
        handle, life = self._replicas[replica], self.supervisor.lives[replica]
        assert handle is not None
        if handle.why:  # it would not go by itself
            handle.end(ask=False, until_s=0.0)
        now_s, error = time.monotonic(), handle.error()
        self._selector.unregister(handle)
        self._replicas[replica] = None
        tells = handle.failed is not None or not isinstance(handle, RemoteReplica)  # a host that goes may come again
        never_ran = life.state is State.STARTING and life.starts == 1 and tells
        absent = error.kind == "absent" and life.state is State.STARTING
        state = (self.supervisor.absent if absent else self.supervisor.failed)(replica, now_s)
        if never_ran:
            handle.end(ask=False, until_s=0.0)
            raise ConfigError(str(error)) if error.error_type == "ConfigError" else error
        then = self._after(replica, state, error)
        if state is State.WAITING and isinstance(handle, RemoteReplica):
            then = "it is taken back when its host offers it again"
        try:
            yield Lost(replica, error, then)  # its requests first
        finally:
            handle.end(ask=False, until_s=0.0)

    def _flush(self, replica: int) -> None:
        handle = self._replicas[replica]
        if handle is not None:
            with contextlib.suppress(ConnectionError):
                handle.channel.flush()
            self._watch(replica, handle)

    def _watch(self, replica: int, handle: ReplicaHandle) -> None:
        """Wake up for room to write only while something waits for it."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if handle.channel.unsent else 0)
        if self._selector.get_key(handle).events != events:
            self._selector.modify(handle, events, replica)


def _end_all(
    owner: int,
    replicas: list[ReplicaHandle | None],
    waiting: dict[int, Arrival],
    doorman: Doorman | None,
    death_pipe: tuple[int, int],
    actors: ReplicaActors | None,
) -> None:
    """End every replica: all are asked first, so that they end at the same time. Those that have just come are asked as well."""
    if os.getpid() != owner:  # a child that the program forked: it has our descriptors, and nothing to end
        return
    running = [handle for handle in replicas if handle is not None]
    try:
        for handle in running:
            handle.ask()
        if doorman is not None:
            doorman.close()  # before the last look: nobody comes in behind it
            for arrival in (*waiting.values(), *doorman.arrived()):
                running.append(RemoteReplica(arrival))
                running[-1].listens = False  # it is loading, and hears of it when it is through
                running[-1].ask()
        until_s = time.monotonic() + STOP_S
        for handle in running:
            handle.end(ask=handle.listens, until_s=until_s)
        replicas[:] = [None] * len(replicas)
    finally:  # whatever interrupts us: without the pipe they end
        for fd in death_pipe:
            os.close(fd)
        if actors is not None:
            actors.close()
