"""The engine's side of the link: a loop that hears API processes and steps the engine client. One thread, no await.

Requests are named `<name given by the API process>`; whose they are is known by the connection that they came over. When an API
process says Hello again, it is another one under its name: what the former ran is aborted.
"""

from __future__ import annotations

import hmac
import time
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
    "abort_requests": lambda client, names=None: abort(client, names),
    "mode": lambda client: [(health := client.health()).paused, health.sleep_level],
    "write_profile": lambda client, folder: str(client.stop_profile().write(folder)),
    "stats": lambda client: client.stats(),
    "ranks": lambda client: client.ranks(),
    "collective_rpc": lambda client, *args: client.collective_rpc(*args),
    "start_profile": lambda client: client.start_profile(),
    "stop_profile": lambda client: client.stop_profile(),
}


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
        called = {info.response_id, info.external_id, info.request_id, info.request_id.rpartition(".")[0]} - {""}
        if names is None or called & asked:
            found.append(info.request_id)
    client.abort(found)
    return found


def bind(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    """The socket that API processes connect to. Its path is in a folder of this user alone."""
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_BYTES)
    socket.setsockopt(zmq.SNDHWM, 0)  # what an API process does not read waits here: it is dropped with its requests
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 1000)
    socket.bind(endpoint)
    return socket


class EngineServer:
    """Serves API processes until the engine fails, or whoever runs it stops calling `turn`."""

    def __init__(
        self, client: EngineClient, socket: zmq.Socket[bytes], secret: str, on_beat: Callable[[EngineHealth], None] = lambda health: None
    ) -> None:
        """on_beat: also told how the engine is, as often as API processes are."""
        self.client = client
        self._socket, self._secret = socket, secret
        self._nonces: dict[bytes, tuple[bytes, bytes]] = {}  # of those that said Hello and are not admitted: theirs, ours
        self._owner: dict[str, bytes] = {}  # request -> the API process that it is of
        self._admitted: set[bytes] = set()
        self._beaten_s, self._on_beat = 0.0, on_beat
        self.metrics = RequestMetrics(client)
        self._calls = CALLS | {"metrics": lambda _: self.metrics.snapshot(), "cluster": lambda _: self.metrics.cluster()}
        client.tick = self.beat
        client.watch(int(socket.getsockopt(zmq.FD)))

    def run(self) -> None:
        """Until the engine fails. Raises its ExecutorError, after every request has been ended."""
        while True:
            self.turn()

    def turn(self) -> None:
        """Hear everything there is, step once, tell what it brought."""
        self._hear()
        outputs = self.client.step()
        self.metrics.took(outputs)
        self._tell(outputs)
        self.beat()
        if self.client.failure is not None:
            for who in self._admitted:
                self._send(who, wire.Dead(str(self.client.failure)))
            raise self.client.failure

    def beat(self) -> None:
        """Tell every API process how the engine is, when it is time. Also called while the engine waits for its replicas."""
        now_s = time.monotonic()
        if now_s - self._beaten_s >= PULSE_S:
            self._beaten_s = now_s
            health = self.client.health()
            self._on_beat(health)
            self.metrics.sleep_level = health.sleep_level
            pulse = wire.Pulse(health)
            for who in self._admitted:
                self._send(who, pulse)

    def _hear(self) -> None:
        """Every message that has come. Also re-arms the socket's descriptor: it only signals what came after this."""
        while int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            who, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            try:
                order = wire.decode_order(frames[0] if len(frames) == 1 else b"")
            except NO_MESSAGE:
                _log.warning("a message of %d bytes that is none was dropped", sum(map(len, frames)))
                continue
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
        self._admitted.discard(who)
        gone = [name for name, owner in self._owner.items() if owner == who]
        self.client.abort(gone)
        for name in gone:
            del self._owner[name]

    def _take(self, who: bytes, order: wire.Order) -> None:
        if isinstance(order, wire.Add):
            self._add(who, order)
        elif isinstance(order, wire.Abort):
            self.client.abort([name for name in order.request_ids if self._owner.get(name) == who])
        elif isinstance(order, wire.Call):
            self._send(who, self._call(order))

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

    def _send(self, who: bytes, reply: wire.Reply) -> None:
        self._socket.send_multipart([who, wire.encode(reply)])
