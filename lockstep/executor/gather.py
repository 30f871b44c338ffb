"""The leader's door: the agents of the other hosts knock, prove that they have the key, and are let in when they fit."""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lockstep.config.errors import ConfigError
from lockstep.config.nodes import own_address
from lockstep.config.tree import ParallelConfig
from lockstep.distributed.progress import rank_list
from lockstep.executor import node_wire
from lockstep.executor.contract import ExecutorError
from lockstep.executor.crew import received
from lockstep.executor.failure import LogTail
from lockstep.executor.link import Link, LinkLost
from lockstep.executor.node_wire import Challenge, Hello, Identity, Refused, Welcome
from lockstep.executor.wire import FrameReader
from lockstep.observability.logging import get_logger
from lockstep.utils import env, handshake, net
from lockstep.utils.frames import NO_MESSAGE
from lockstep.utils.net import Listener
from lockstep.utils.shm import Bell

MAX_GUESTS = 64  # that have said nothing yet
_TICK_S = 0.1
_log = get_logger(__name__)


@dataclass
class RemoteRank:
    """One rank on another host as the leader sees it: written by the monitor thread, from what the host's agent says."""

    rank: int
    where: str  # " on node 1 (its host)"
    frames: FrameReader = field(default_factory=FrameReader)
    tail: LogTail = field(default_factory=LogTail)
    ready: bool = False
    letter: str = ""
    code: int | None = None
    oom: bool = False

    def exit_code(self) -> int | None:
        return self.code

    def state(self) -> str:
        return self.letter


@dataclass
class Node:
    """Another host."""

    number: int
    host: str
    link: Link
    ranks: dict[int, RemoteRank] = field(default_factory=dict)
    ended: bool = False  # it left, and need not be told anything

    @property
    def name(self) -> str:
        return f"node {self.number} ({self.host})"


@dataclass
class _Guest:
    link: Link
    address: str
    nonce: bytes
    since: float


class Door:
    """The socket at master_addr:master_port, bound before anything is started."""

    first = 1  # number of the first node that comes; 0 would be the leader's own

    def __init__(self, parallel: ParallelConfig, key: str | None = None) -> None:
        """key: default LOCKSTEP_CLUSTER_KEY. Raises ConfigError when this host has no such address or the port is taken."""
        self.parallel, self.key = parallel, env.cluster_key() if key is None else key
        self.address = own_address(parallel.master_addr, "master_addr")
        try:
            self.listener = Listener(self.address, parallel.master_port)
        except OSError as e:
            raise ConfigError(
                f"master_addr={parallel.master_addr!r}, master_port={parallel.master_port}: {e}. Node 0 must listen at an address of its "
                "own and a free port: choose another port on every node, or set LOCKSTEP_HOST_IP on node 0 to the address that it has."
            ) from None
        self.at = f"{parallel.master_addr}:{parallel.master_port}"
        if not self.key and not net.is_loopback(self.address):
            warn_of_no_key()

    @property
    def expected(self) -> range:
        """The numbers of the nodes that come."""
        return range(self.first, self.parallel.nnodes)

    def watch(self) -> None:
        """Called over and over while nodes are awaited. Raises ExecutorError when one of them cannot come any more."""

    def explain(self, number: int) -> str:
        """What else is known about a node that is lost, to go on with after the reason; "" for nothing."""
        return ""

    def advice(self, late: Sequence[int]) -> str:
        """What to do about nodes that did not come."""
        parallel, each = self.parallel, late[0] if len(late) == 1 else "N"
        return (
            f"start {'it' if len(late) == 1 else 'each'} with --nnodes {parallel.nnodes} --node-rank {each} "
            f"--master-addr {parallel.master_addr} --master-port {parallel.master_port} --headless, and see that no firewall is between"
        )


def warn_of_no_key() -> None:
    """Said once on every node of several hosts without a key."""
    _log.warning("LOCKSTEP_CLUSTER_KEY is not set: whoever reaches the leader's port can join; set the same secret on every node.")


class Gathering:
    """Waits for all other nodes. They beat, and are beaten to, from their welcome on."""

    def __init__(self, door: Door, settings: Mapping[str, str], limit_s: float, bell: Bell, stopping: Callable[[], bool]) -> None:
        """settings: those that all nodes must say alike. bell: rung when `stopping` may have become true."""
        self._door, self._settings, self._limit_s, self._bell, self._stopping = door, settings, limit_s, bell, stopping
        self._key, self._versions = door.key, node_wire.versions()
        self._guests: list[_Guest] = []
        self._refused: list[str] = []

    def run(self, nodes: dict[int, Node]) -> bool:
        """Fill `nodes`, by number. False when it was stopped first.

        Raises ExecutorError naming who is missing when the time is up, and who does not fit at once.
        """
        until = time.monotonic() + self._limit_s
        listener = self._door.listener
        try:
            while len(nodes) < len(self._door.expected):
                if self._stopping():
                    return False
                if time.monotonic() > until:
                    raise self._missing(nodes)
                self._door.watch()
                self._round(nodes)
            return True
        finally:
            listener.close()  # whoever comes later is told by the kernel
            for guest in self._guests:
                guest.link.close()

    def _round(self, nodes: dict[int, Node]) -> None:
        with selectors.DefaultSelector() as selector:
            sockets = [*(guest.link.socket for guest in self._guests), *(node.link.socket for node in nodes.values())]
            watched: list[Any] = [self._door.listener, self._bell.fds[0], *sockets]
            for what in watched:
                selector.register(what, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in selector.select(_TICK_S)]
        if self._bell.fds[0] in ready:
            self._bell.wait(0)
        for guest in list(self._guests):
            if guest.link.socket in ready or time.monotonic() - guest.since > self._door.parallel.node_timeout_seconds:
                self._hear(guest, nodes)
        for node in list(nodes.values()):
            why = received(node.link)[1] if node.link.socket in ready else ""
            try:
                node.link.keep(lambda: node_wire.Beat(time.monotonic_ns()))
            except LinkLost as e:
                why = why or str(e)
            if why:  # before anything was started: it may come again
                _log.warning("%s went away while others were awaited: %s", node.name, why)
                nodes.pop(node.number).link.close()
        if self._door.listener in ready:
            self._accept()

    def _accept(self) -> None:
        try:
            connection, address = self._door.listener.accept()
        except OSError:
            return
        if len(self._guests) >= MAX_GUESTS:
            connection.close()
            return
        guest = _Guest(
            Link(connection, self._door.parallel.node_timeout_seconds, self._bell.ring), address, os.urandom(32), time.monotonic()
        )
        guest.link.send(Challenge(node_wire.PROTOCOL, guest.nonce))
        self._guests.append(guest)

    def _hear(self, guest: _Guest, nodes: dict[int, Node]) -> None:
        """The guest's Hello, or the end of its visit."""
        messages, why = received(guest.link)
        if not messages and not why and time.monotonic() - guest.since <= self._door.parallel.node_timeout_seconds:
            return  # part of it
        self._guests.remove(guest)
        hello = messages[0] if messages else None
        if not isinstance(hello, Hello):
            guest.link.close()
            self._note(f"{guest.address} connected and did not greet as a node does ({why or 'it said something else, or nothing'})")
            return
        if not handshake.proven(hello.proof, self._key, "agent", guest.nonce, hello.nonce, hello.identity):
            reason = "its LOCKSTEP_CLUSTER_KEY is not the leader's: set the same one on every node"
            guest.link.close(Refused(reason))
            self._note(f"a node at {guest.address} was refused: {reason}")
            return
        try:
            who = msgspec.msgpack.decode(hello.identity, type=Identity)
        except NO_MESSAGE as e:
            guest.link.close(Refused(f"its greeting cannot be read: {e}"))
            self._note(f"a node at {guest.address} was refused: its greeting cannot be read")
            return
        name = f"node {who.node_rank} ({who.host}, pid {who.pid})"
        misfit = self._misfit(who)
        if misfit:
            guest.link.close(Refused(misfit))
            raise ExecutorError(f"{name} was refused: {misfit}.", phase="node", kind="refused")
        if who.node_rank in nodes or who.node_rank not in self._door.expected:
            there = nodes.get(who.node_rank)
            reason = f"node_rank={who.node_rank} is taken" + (f" by the one on {there.host}" if there else " by the leader")
            guest.link.close(Refused(f"{reason}: give each node its own, from 1 to {self._door.parallel.nnodes - 1}"))
            self._note(f"another {name} was refused: {reason}")
            return
        guest.link.frames.limit = node_wire.MESSAGE_BYTES
        guest.link.send(Welcome(handshake.prove(self._key, "leader", hello.nonce, guest.nonce)))
        nodes[who.node_rank] = Node(who.node_rank, who.host, guest.link)
        _log.info("%s has connected from %s", name, guest.address)

    def _misfit(self, who: Identity) -> str:
        """Why this node cannot take part; "" when it can."""
        for what, theirs, own in zip(("lockstep", "torch"), (who.lockstep, who.torch), self._versions, strict=True):
            if theirs != own:
                return f"it runs {what} {theirs} and the leader {own}: install the same version on every node"
        for name in {**self._settings, **who.settings}:
            theirs, own = who.settings.get(name, "nothing"), self._settings.get(name, "nothing")
            if theirs != own:
                return f"it has {name}={theirs} and the leader {name}={own}: say the same on every node"
        return ""

    def _note(self, text: str) -> None:
        _log.warning("%s", text)
        self._refused = [*self._refused[-4:], text]

    def _missing(self, nodes: dict[int, Node]) -> ExecutorError:
        late = [n for n in self._door.expected if n not in nodes]
        who = rank_list(late).replace("rank", "node", 1)
        message = (
            f"{who} of {self._door.parallel.nnodes} {'has' if len(late) == 1 else 'have'} not connected to {self._door.at} in "
            f"{self._limit_s:g} s: {self._door.advice(late)} (startup_timeout_seconds={self._limit_s:g})."
        )
        if net.is_loopback(self._door.address) and self._door.first:
            message += f" {self._door.address} can be reached from this host only: for others, give its network address as master_addr."
        if self._refused:
            message += " Meanwhile, " + "; ".join(self._refused) + "."
        return ExecutorError(message, phase="node", kind="hung")
