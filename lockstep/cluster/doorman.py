"""The leader's door for replicas that other hosts keep: who may come in is settled here, on threads of its own.

The router never waits for a stranger: it learns of a replica when the greeting is over and the connection is worth having.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import socket
import threading
import time
from dataclasses import dataclass

from lockstep.cluster import greeting, wire
from lockstep.cluster.greeting import Challenge, Identity, Refused, Welcome
from lockstep.config.defaults import default_backend
from lockstep.config.errors import ConfigError
from lockstep.config.nodes import meeting_point, own_address
from lockstep.config.tree import ParallelConfig
from lockstep.observability.logging import get_logger, say
from lockstep.utils import env, net
from lockstep.utils.frames import NO_MESSAGE, receive_one, send_one
from lockstep.utils.handshake import prove, proven

GREETING_S = 5.0  # how long a greeting may take
MOST_GUESTS = 64  # greeted at once: whoever comes then has to come again
LAST_GREETINGS_S = 1.0  # how long the end waits for greetings that are going on

_log = get_logger(__name__)


@dataclass(frozen=True)
class Arrival:
    """A replica of another host that may be given a start."""

    replica: int
    connection: socket.socket
    host: str
    keeper: bytes

    @property
    def ended(self) -> bool:
        """Whether the other side has hung up, also where there is something left to read."""
        fd = self.connection.fileno()
        if fd < 0:
            return True
        poll = select.poll()
        poll.register(fd, getattr(select, "POLLRDHUP", 0))
        return bool(poll.poll(0))


class Doorman:
    """`fileno` is readable when somebody has come in. The router calls; guests are greeted on other threads."""

    def __init__(self, parallel: ParallelConfig, settings: dict[str, str], key: str | None = None) -> None:
        """Listen. settings: those that hosts must agree on. key: what they must know; None: LOCKSTEP_CLUSTER_KEY.

        Raises ConfigError when this host has no such address or port.
        """
        self.parallel, self._settings = parallel, settings
        self._key, self._versions = env.cluster_key() if key is None else key, greeting.versions()
        self._lock = threading.Lock()
        self._holders: dict[int, Arrival] = {}  # the last who was let in, by replica; an ended one holds nothing
        self._barred: dict[int, str] = {}
        self._refused: list[str] = []
        self._arrivals: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._guests = threading.Semaphore(MOST_GUESTS)
        self._closed = False  # nobody is let in; with the lock held
        self._listener = _listener(parallel)
        self.at = f"{parallel.data_parallel_address}:{self._listener.port}"
        self._bell, self._ring = socket.socketpair()
        self._stop, self._stopped = socket.socketpair()
        for end in (self._bell, self._ring):
            end.setblocking(False)
        if not self._key and not net.is_loopback(self.host):
            _log.warning("LOCKSTEP_CLUSTER_KEY is not set: whoever reaches %s can join; set the same secret on every host.", self.at)
        if key is None and _log.isEnabledFor(logging.WARNING):  # a key of its own: Ray starts the others, and nobody has to be told
            say(f"distributed_executor_backend is {default_backend(parallel)}: hosts report at {self.at}")
        self._thread = threading.Thread(target=self._listen, name="dp-doorman", daemon=True)
        self._thread.start()

    @property
    def host(self) -> str:
        """The address at which it listens, in digits."""
        return self._listener.host

    @property
    def port(self) -> int:
        """At which it listens."""
        return self._listener.port

    def fileno(self) -> int:
        return self._bell.fileno()

    def arrived(self) -> list[Arrival]:
        """Who has come in since the last call; after `close`, who had before it."""
        with contextlib.suppress(OSError):
            while self._bell.recv(64):
                pass
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._arrivals.get_nowait())
        return found

    def bar(self, replica: int, reason: str) -> None:
        """Refuse this replica from now on."""
        with self._lock:
            self._barred[replica] = reason

    def missing(self, replicas: list[int], waited_s: float) -> str:
        """That nobody has come for these replicas: how to start them, and who was refused meanwhile."""
        p = self.parallel
        several = len(replicas) > 1
        place = f"-dpl {len(replicas)} -dpr {replicas[0]} -dpa {p.data_parallel_address} -dpp {p.data_parallel_rpc_port}` on another host"
        if p.nnodes > 1:
            late = sorted({replica // p.local_replicas for replica in replicas})
            place = f"--nnodes {p.nnodes} --node-rank N --master-addr {p.master_addr} --master-port {p.master_port}` on "
            place += f"node{'s' if len(late) > 1 else ''} N = {', '.join(map(str, late))}"
        text = (
            f"replica{'s' if several else ''} {', '.join(map(str, replicas))} {'have' if several else 'has'} not reported at {self.at} in "
            f"{waited_s:g} s: start `lockstep generate MODEL --headless -dp {p.data_parallel_size} {place}, and see that no firewall is "
            "between."
        )
        if net.is_loopback(self.host):
            text += f" {self.host} is reached from this host only: for others, give its network address as {meeting_point(p)[0]}."
        with self._lock:
            return text + (f" Meanwhile, {'; '.join(self._refused)}." if self._refused else "")

    def close(self) -> None:
        """Let nobody in any more. Who is just being greeted is waited for, a moment. May be called twice."""
        if self._stop.fileno() < 0:
            return
        self._stop.close()
        self._thread.join(2.0)
        until_s = time.monotonic() + LAST_GREETINGS_S
        for _ in range(MOST_GUESTS):
            self._guests.acquire(timeout=max(0.0, until_s - time.monotonic()))
        with self._lock:
            self._closed = True
        for end in (self._stopped, self._bell, self._ring):
            end.close()

    # --- on other threads ---

    def _listen(self) -> None:
        poll = select.poll()
        poll.register(self._listener.fileno(), select.POLLIN)
        poll.register(self._stopped.fileno(), select.POLLIN)
        with self._listener:
            while True:
                if self._stopped.fileno() in [fd for fd, _ in poll.poll()]:
                    return
                try:
                    connection, address = self._listener.accept()
                except OSError:  # it hung up already; or no descriptor is left, which passes
                    time.sleep(0.01)
                    continue
                if not self._guests.acquire(blocking=False):
                    self._note(f"{address} was turned away: {MOST_GUESTS} greetings are going on")
                    connection.close()
                    continue
                threading.Thread(target=self._receive, args=(connection, address), name="dp-greeting", daemon=True).start()

    def _receive(self, connection: socket.socket, address: str) -> None:
        try:
            net.prepare_link(connection, greeting.silence_s(self.parallel))
            self._greet(connection, address)
        except (OSError, *NO_MESSAGE) as e:
            self._note(f"{address} connected and did not greet as a keeper of replicas does ({e})")
            connection.close()
        finally:
            self._guests.release()

    def _greet(self, connection: socket.socket, address: str) -> None:
        deadline_s = time.monotonic() + GREETING_S
        nonce = os.urandom(32)
        send_one(connection, greeting.encode(Challenge(greeting.PROTOCOL, nonce)), deadline_s)
        hello = greeting.decode_hello(receive_one(connection, deadline_s, greeting.MOST_BYTES))
        if not proven(hello.proof, self._key, greeting.KEEPER, nonce, hello.nonce, hello.identity):
            reason = "its LOCKSTEP_CLUSTER_KEY is not the leader's: set the same one on every host"
            self._refuse(connection, f"a host at {address}", Refused(reason), deadline_s)
            return
        who = greeting.decode_identity(hello.identity)
        name = f"replica {who.replica} of host {who.host} ({address}, pid {who.pid})"
        arrival = Arrival(who.replica, connection, who.host, who.keeper)
        refused = self._judge(who, arrival)
        if refused is not None:
            self._refuse(connection, name, refused, deadline_s)
            return
        send_one(connection, greeting.encode(Welcome(prove(self._key, greeting.LEADER, hello.nonce, nonce, hello.identity))), deadline_s)
        _log.info("%s has reported", name)
        with self._lock:
            if not self._closed:
                self._arrivals.put(arrival)
                with contextlib.suppress(OSError):  # full: it rings already
                    self._ring.send(b"1")
                return
        with connection:  # too late for anybody else to tell it
            send_one(connection, wire.encode(wire.Stop()), deadline_s)

    def _judge(self, who: Identity, arrival: Arrival) -> Refused | None:
        """Whether it suits us. If so, the replica is its own from now on."""
        p = self.parallel
        if reason := greeting.misfit(who, self._versions, self._settings):
            return Refused(reason)
        if not p.local_replicas <= who.replica < p.data_parallel_size:
            places = "node_rank" if p.nnodes > 1 else "data_parallel_start_rank and data_parallel_size_local"
            own = f"replicas 0 to {p.local_replicas - 1}" if p.local_replicas else "none"
            return Refused(
                f"replica {who.replica} is not one that another host may keep: the leader runs {own} of {p.data_parallel_size}; choose "
                f"{places} so that they fit"
            )
        with self._lock:
            if who.replica in self._barred:
                return Refused(self._barred[who.replica])
            holder = self._holders.get(who.replica)
            if holder is not None and holder.keeper != who.keeper and not holder.ended:
                own = "node_rank" if p.nnodes > 1 else "data_parallel_start_rank"
                return Refused(f"replica {who.replica} is taken by host {holder.host}: give each host its own {own}", again=True)
            self._holders[who.replica] = arrival
        return None

    def _refuse(self, connection: socket.socket, name: str, refused: Refused, deadline_s: float) -> None:
        self._note(f"{name} was refused: {refused.reason}")
        with contextlib.suppress(OSError), connection:
            send_one(connection, greeting.encode(refused), deadline_s)

    def _note(self, text: str) -> None:
        _log.warning("%s", text)
        with self._lock:
            self._refused = [*self._refused[-4:], text]


def _listener(parallel: ParallelConfig) -> net.Listener:
    address, port = parallel.data_parallel_address, parallel.data_parallel_rpc_port
    at, by = meeting_point(parallel)
    try:
        return net.Listener(own_address(address, at), port)
    except OSError as e:
        if parallel.data_parallel_backend == "ray":  # neither address nor port is the user's
            raise ConfigError(
                f"data_parallel_backend='ray': this process {e.strerror}. Its replicas come to it at an address of its own that the nodes "
                "of the Ray cluster reach: set LOCKSTEP_HOST_IP here to one that this host has, or unset it."
            ) from None
        raise ConfigError(
            f"{at}={address!r}, {by}={port}: {e}. The leader must listen at an address of its own and a "
            "free port: choose another port on every host, or set LOCKSTEP_HOST_IP here to the address that this host has."
        ) from None
