"""The engine's side of the link: a loop that hears API processes and steps the engine client. One thread, no await.

Requests are named `<name given by the API process>`; whose they are is known by the connection that they came over. When an API
process says Hello again, it is another one under its name: what the former ran is aborted. One that says Goodbye is forgotten.
"""

from __future__ import annotations

import hmac
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from lockstep.cluster.contract import EngineClient
from lockstep.cluster.health import EngineHealth
from lockstep.engine.errors import RequestError
from lockstep.executor.contract import ExecutorError
from lockstep.frontend import engine_wire as wire
from lockstep.frontend.request_metrics import RequestMetrics
from lockstep.observability.logging import get_logger
from lockstep.protocol import EngineOutput
from lockstep.protocol.health import PULSE_S
from lockstep.utils.frames import NO_MESSAGE
from lockstep.utils.words import counted

BESIDE_S = 1.5  # so long after the last beat another thread beats: longer than a client naps, so that it never takes a wake-up
MOST_UNREAD = 4096  # messages that wait for an API process: half a minute's, or more

_log = get_logger(__name__)

# What API processes may call: name -> how it is done.
CALLS: dict[str, Callable[..., Any]] = {
    "ping": lambda client: True,
    "pause": lambda client, mode="keep": pause(client, mode),
    "resume": lambda client: client.resume(),
    "sleep": lambda client, level=1: client.sleep(level),
    "wake_up": lambda client: client.wake_up(),
    "reset_prefix_cache": lambda client: client.reset_prefix_cache(),
    "requests": lambda client: client.requests(),
    "unfinished": lambda client: len({wire.job_of(info.request_id) for info in client.requests()}),
    "abort_requests": lambda client, names=None: abort(client, names),
    "mode": lambda client: [(health := client.health()).paused, health.sleep_level],
    "write_profile": lambda client, folder: str(client.stop_profile().write(folder)),
    "stats": lambda client: client.stats(),
    "ranks": lambda client: client.ranks(),
    "collective_rpc": lambda client, *args: client.collective_rpc(*args),
    "start_profile": lambda client: client.start_profile(),
    "stop_profile": lambda client: client.stop_profile(),
}
AT_ONCE = {
    "ping",
    "requests",
    "unfinished",
    "abort_requests",
    "mode",
    "metrics",
    "cluster",
}  # no replica is asked: answered during another call too


def pause(client: EngineClient, mode: str) -> None:
    """Plan no more steps; with mode "abort" end what is unfinished first, with "keep" let it wait. Raises ValueError for another mode."""
    if mode not in ("abort", "keep"):
        raise ValueError(f"mode={mode!r} does not exist: abort ends running requests, keep lets them wait.")
    client.pause()
    if mode == "abort":
        abort(client, None)


def abort(client: EngineClient, names: list[str] | None) -> list[str]:
    """End these requests, or all: by the id of their response, of their HTTP request, or by the engine's name, each of them whole (it
    may leave out the number of one of n completions: then all are meant). The engine's names of those that were there.
    """
    asked, found = set(names or ()), []
    for info in client.requests():
        called = {info.response_id, info.external_id, info.request_id, wire.job_of(info.request_id)} - {""}
        if names is None or called & asked:
            found.append(info.request_id)
    client.abort(found)
    return found


def bind(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    """The socket that API processes connect to. Its path is in a folder of this user alone."""
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_BYTES)
    socket.setsockopt(zmq.SNDHWM, MOST_UNREAD)  # an API process that does not read is dropped, with its requests,
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # and so is one that is gone: sending says so
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.bind(endpoint)
    return socket


def _end_here(count: int) -> str:
    return f"{counted(count, 'request')} of it {'ends' if count == 1 else 'end'} here"


class EngineServer:
    """Serves API processes until the engine fails, or whoever runs it stops calling `turn`."""

    def __init__(
        self,
        client: EngineClient,
        socket: zmq.Socket[bytes],
        secret: str,
        on_beat: Callable[[EngineHealth], None] = lambda health: None,
        *,
        restarts: int = 0,
        replaced: bool = False,
    ) -> None:
        """on_beat: also told how the engine is, as often as API processes are; from any thread. restarts: engines before this one.

        replaced: when this engine fails another one takes its place, and its requests go on there: nobody hears of that.
        """
        self.client = client
        self._socket, self._secret = socket, secret
        self._nonces: dict[bytes, tuple[bytes, bytes]] = {}  # of those that said Hello and are not admitted: theirs, ours
        self._owner: dict[str, bytes] = {}  # request -> the API process that it is of
        self._admitted: set[bytes] = set()
        self._beaten_s, self._on_beat = 0.0, on_beat
        self._unreached: dict[bytes, int] = {}  # admitted, and they do not read, or are gone: what sending failed with
        self._dropped: set[bytes] = set()  # that are to be told so
        self._speaking, self._ended = threading.Lock(), threading.Event()
        self._calling, self._later = False, deque[tuple[bytes, wire.Call]]()
        self._replaced = replaced
        self.metrics = RequestMetrics(client, restarts=restarts)
        self._calls = CALLS | {"metrics": lambda _: self.metrics.snapshot(), "cluster": lambda _: self.metrics.cluster()}
        client.tick = self._meanwhile
        client.watch(int(socket.getsockopt(zmq.FD)))

    def run(self) -> None:
        """Until the engine fails. Raises its ExecutorError, after every request has been ended."""
        beater = threading.Thread(target=self._beat_on, name="pulse", daemon=True)
        if not self.client.ticks:
            beater.start()
        try:
            while True:
                self.turn()
        finally:
            self._ended.set()
            if not self.client.ticks:
                beater.join()

    def _beat_on(self) -> None:
        """Beside a client whose steps take as long as they take."""
        while not self._ended.wait(PULSE_S / 2):
            try:
                if time.monotonic() - self._beaten_s >= BESIDE_S:
                    self._beat_now()
            except ConnectionError:
                return  # the parent is gone: the main thread sees it too
            except Exception:  # the numbers are the main thread's, and change while they are read: the next beat has them
                _log.exception("a heartbeat of the engine failed")

    def turn(self) -> None:
        """Hear everything there is, step once, tell what it brought."""
        self._hear()
        while self._later:
            who, order = self._later.popleft()
            self._answer(who, order)
        self._take_outputs(self.client.step() if self.client.failure is None else self.client.gathered())
        self.beat()
        self._drop_unreached()
        if self.client.failure is not None:
            for who in () if self._replaced else list(self._admitted):
                self._send(who, wire.Dead(str(self.client.failure)))
            raise self.client.failure

    def _take_outputs(self, outputs: list[EngineOutput]) -> None:
        if self._replaced and self.client.failure is not None:
            outputs = [output for output in outputs if output.finish_reason != "error"]
        self.metrics.took(outputs)
        self._tell(outputs)

    def _meanwhile(self) -> None:
        """In every wait of the client. During a call requests go on: what they bring is told, what comes is heard; calls wait."""
        self.beat()
        if self._calling:
            self._take_outputs(self.client.gathered())
            self._hear()

    def beat(self) -> None:
        """Tell every API process how the engine is, when it is time. Also called while the engine waits for its replicas."""
        if time.monotonic() - self._beaten_s >= PULSE_S:
            self._beat_now()

    def _beat_now(self) -> None:
        self._beaten_s = time.monotonic()
        health = self.client.health()
        self._on_beat(health)
        self.metrics.sleep_level = health.sleep_level
        pulse = wire.Pulse(health)
        for who in list(self._admitted):
            self._send(who, pulse)

    def _hear(self) -> None:
        """Every message that has come. Also re-arms the socket's descriptor: it only signals what came after this."""
        while (message := self._receive()) is not None:
            who, *frames = message
            try:
                order = wire.decode_order(frames[0] if len(frames) == 1 else b"")
            except NO_MESSAGE:
                _log.warning("a message of %d bytes that is none was dropped", sum(map(len, frames)))
                continue
            if who in self._dropped and not isinstance(order, wire.Hello | wire.Proof):
                continue  # it does not know yet
            if who in self._admitted and not isinstance(order, wire.Hello):
                self._take(who, order)
            else:
                self._greet(who, order)

    def _greet(self, who: bytes, order: wire.Order) -> None:
        if isinstance(order, wire.Hello):
            self._forget(who)
            ours = wire.nonce()
            self._nonces[who] = (order.nonce, ours)
            self._send(who, wire.Challenge(ours, wire.engine_proof(self._secret, order.nonce, ours)))
            return
        theirs, ours = self._nonces.pop(who, (b"", b""))
        right = isinstance(order, wire.Proof) and ours and hmac.compare_digest(order.proof, wire.api_proof(self._secret, theirs, ours))
        if not right:
            _log.warning("a connection without the run's secret was refused")
            return
        self._admitted.add(who)
        self._send(who, wire.Welcome(self.client.config, self.client.memory))
        self._send(who, wire.Pulse(self.client.health()))

    def _forget(self, who: bytes) -> None:
        self._unreached.pop(who, None)
        for those in (self._admitted, self._dropped):
            those.discard(who)
        gone = [name for name, owner in self._owner.items() if owner == who]
        self.client.abort(gone)
        for name in gone:
            del self._owner[name]

    def _take(self, who: bytes, order: wire.Order) -> None:
        if isinstance(order, wire.Add):
            self._add(who, order)
        elif isinstance(order, wire.Abort):
            self.client.abort([name for name in order.request_ids if self._owner.get(name) == who])
        elif isinstance(order, wire.Goodbye):
            self._forget(who)
        elif isinstance(order, wire.Call):
            if self._calling and order.method not in AT_ONCE:
                self._later.append((who, order))
            else:
                self._answer(who, order)

    def _answer(self, who: bytes, order: wire.Call) -> None:
        outer, self._calling = self._calling, True
        before = self._mode()
        try:
            answer = self._call(order)
        finally:
            self._calling = outer
        if self._mode() != before:  # who would start another engine knows it before who asked for it
            self._beat_now()
        self._send(who, answer)

    def _mode(self) -> tuple[bool, int]:
        health = self.client.health()
        return health.paused, health.sleep_level

    def _add(self, who: bytes, order: wire.Add) -> None:
        name = order.request.request_id
        try:
            if name in self._owner:
                raise RequestError(f"request id {name!r} is in use by an unfinished request: choose another id.")
            self.client.add_request(order.request)
        except (RequestError, ExecutorError) as e:  # the API process checks too: what only the engine refuses still ends once
            refused = EngineOutput(request_id=name, new_token_ids=[], finish_reason="error", error=str(e))
            self._send(who, wire.Outputs([refused]))
            return
        self._owner[name] = who
        self.metrics.added(order.request)

    def _tell(self, outputs: list[EngineOutput]) -> None:
        """To each API process what is of its requests."""
        by_owner: dict[bytes, list[EngineOutput]] = {}
        for output in outputs:
            who = self._owner.get(output.request_id)
            if who is None:
                continue  # its API process is gone
            by_owner.setdefault(who, []).append(output)
            if output.finish_reason is not None:
                del self._owner[output.request_id]
        for who, theirs in by_owner.items():
            self._send(who, wire.Outputs(theirs))

    def _call(self, order: wire.Call) -> wire.Answer | wire.Refused:
        if order.method not in self._calls:
            return wire.Refused(order.id, f"the engine has no call {order.method!r}.", True)
        try:
            return wire.Answer(order.id, msgspec.Raw(wire.encode(self._calls[order.method](self.client, *order.args))))
        except Exception as e:
            expected = isinstance(e, RequestError | ExecutorError | ValueError)
            message = str(e) if expected else f"{type(e).__name__}: {e}"
            return wire.Refused(order.id, message, isinstance(e, ValueError))

    def _receive(self) -> list[bytes] | None:
        with self._speaking:
            if not int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                return None
            return self._socket.recv_multipart(zmq.NOBLOCK)

    def _send(self, who: bytes, reply: wire.Reply) -> bool:
        """Whether there was room for it. Who does not read is dropped in this turn."""
        with self._speaking:
            try:
                self._socket.send_multipart([who, wire.encode(reply)], zmq.NOBLOCK)
            except zmq.ZMQError as e:  # EAGAIN: no room; EHOSTUNREACH: it has hung up
                if e.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                    raise
                self._unreached[who] = e.errno
                return False
        return True

    def _drop_unreached(self) -> None:
        """End what they run that do not read, or are gone; say so to those that read again."""
        if zmq.EHOSTUNREACH in dict(self._unreached).values():
            self._hear()  # who hung up may have said Goodbye before
        for who, errno in dict(self._unreached).items():
            if who not in self._admitted:
                continue
            count = sum(owner == who for owner in self._owner.values())
            if errno == zmq.EAGAIN:
                _log.error("%s does not read what the engine says (%d messages): %s", who.decode(), MOST_UNREAD, _end_here(count))
            elif count:
                _log.error("%s is gone: %s", who.decode(), _end_here(count))
            self._forget(who)
            self._dropped.add(who)
        self._unreached.clear()
        for who in list(self._dropped):
            if self._send(who, wire.Dropped()):
                self._dropped.discard(who)
        self._unreached.clear()
