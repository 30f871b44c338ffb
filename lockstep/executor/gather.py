"""The leader's door: the agents of the other hosts knock, prove that they have the key, and are let in when they fit."""

from __future__ import annotations

import os
import selectors
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lockstep.config.errors import ConfigError
from lockstep.config.nodes import own_address
from lockstep.config.tree import ParallelConfig
from lockstep.distributed import greeting
from lockstep.distributed.greeting import Challenge, Hello, Identity, Refused
from lockstep.distributed.progress import rank_list
from lockstep.executor import node_wire
from lockstep.executor.contract import ExecutorError
from lockstep.executor.crew import received
from lockstep.executor.failure import LogTail
from lockstep.executor.link import Link, LinkLost
from lockstep.executor.node_wire import SIDES
from lockstep.executor.wire import FrameReader
from lockstep.observability.logging import get_logger
from lockstep.utils import env, net
from lockstep.utils.frames import NO_MESSAGE
from lockstep.utils.net import Listener
from lockstep.utils.shm import Bell

MAX_GUESTS = 64  # that have said nothing yet: one more, and the first of them has to go
FAREWELL_S = 1.0  # for who was refused to hang up
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
    challenge: Challenge
    since: float


class Door:
    """The socket at master_addr and the port of this replica's nodes, bound before anything is started."""

    first = 1  # number of the first node that comes; 0 would be the leader's own

    def __init__(self, parallel: ParallelConfig, key: str | None = None) -> None:
        """key: default LOCKSTEP_CLUSTER_KEY. Raises ConfigError when this host has no such address or the port is taken."""
        self.parallel, self.key = parallel, env.cluster_key() if key is None else key
        self.address = own_address(parallel.master_addr, "master_addr")
        try:
            self.listener = Listener(self.address, parallel.report_port)
        except OSError as e:
            more = f" to {parallel.master_port + parallel.data_parallel_size - 1} (one for each replica)" if parallel.in_groups else ""
            raise ConfigError(
                f"master_addr={parallel.master_addr!r}, master_port={parallel.master_port}{more}: {e}. Node 0 must listen at an address of "
                "its own and a free port: choose another port on every node, or set LOCKSTEP_HOST_IP on node 0 to the address that it has."
            ) from None
        self.at = f"{parallel.master_addr}:{parallel.report_port}"
        if not self.key and not net.is_loopback(self.address):
            warn_of_no_key()

    @property
    def expected(self) -> range:
        """The numbers of the nodes that come."""
        group = self.parallel.group
        return range(max(self.first, group.start), group.stop)

    def watch(self) -> None:
        """Called over and over while nodes are awaited. Raises ExecutorError when one of them cannot come any more."""

    def explain(self, number: int) -> str:
        """What else is known about a node that is lost, to go on with after the reason; "" for nothing."""
        return ""

    def say_who_is_awaited(self, model: str | None, limit_s: float) -> None:
        """Tell at once what the start waits for, and how to go on. model: as it was named here; None: the embedded one."""
        parallel, numbers = self.parallel, list(self.expected)
        who, there = ("node", "that host") if len(numbers) == 1 else ("nodes", "each of their hosts")
        if net.is_loopback(self.address):
            _log.warning(
                "master_addr=%s is this host alone: no other host can reach it. Give --master-addr an address of this host that the "
                "others can, the same on every node.",
                parallel.master_addr,
            )
        each = numbers[0] if len(numbers) == 1 else f"N (N from {numbers[0]} to {numbers[-1]})"
        _log.warning(
            "waiting for %s of %d at %s, for up to %g s (startup_timeout_seconds). Run on %s, with the other settings of this command:\n"
            "  lockstep serve%s -tp %d -pp %d%s --nnodes %d --node-rank %s --master-addr %s --master-port %d --headless",
            *(f"{who} {', '.join(map(str, numbers))}", parallel.nnodes, self.at, limit_s, there),
            *(f" {shlex.quote(model)}" if model else "", parallel.tensor_parallel_size, parallel.pipeline_parallel_size),
            *(_replicas(parallel), parallel.nnodes, each, parallel.master_addr, parallel.master_port),
        )

    def advice(self, late: Sequence[int]) -> str:
        """What to do about nodes that did not come."""
        parallel, each = self.parallel, late[0] if len(late) == 1 else "N"
        return (
            f"start {'it' if len(late) == 1 else 'each'} with{_replicas(parallel)} --nnodes {parallel.nnodes} --node-rank {each} "
            f"--master-addr {parallel.master_addr} --master-port {parallel.master_port} --headless, and see that no firewall is between"
        )


def _replicas(parallel: ParallelConfig) -> str:
    """The flag for the number of replicas, where nodes have to know it."""
    return f" -dp {parallel.data_parallel_size}" if parallel.in_groups else ""


def warn_of_no_key() -> None:
    """Said once on every node of several hosts without a key."""
    _log.warning("LOCKSTEP_CLUSTER_KEY is not set: whoever reaches the leader's port can join; set the same secret on every node.")


class Gathering:
    """Waits for all other nodes. They beat, and are beaten to, from their welcome on.

    Strangers may come in any number: nothing here ever waits for one of them, and those who are refused are forgotten soon.
    """

    def __init__(self, door: Door, settings: Mapping[str, str], limit_s: float, bell: Bell, stopping: Callable[[], bool]) -> None:
        """settings: those that all nodes must say alike. bell: rung when `stopping` may have become true."""
        self._door, self._settings, self._limit_s, self._bell, self._stopping = door, settings, limit_s, bell, stopping
        self._key, self._versions = door.key, greeting.versions()
        self._guests: list[_Guest] = []
        self._leaving: list[tuple[Link, float]] = []  # refused, oldest first; until when they may take the reason
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
            for link in [*(guest.link for guest in self._guests), *(link for link, _ in self._leaving)]:
                link.close()

    def _round(self, nodes: dict[int, Node]) -> None:
        with selectors.DefaultSelector() as selector:
            links = [*(guest.link for guest in self._guests), *(link for link, _ in self._leaving), *(node.link for node in nodes.values())]
            watched: list[Any] = [self._door.listener, self._bell.fds[0], *(link.socket for link in links)]
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
        self._let_go(ready)
        if self._door.listener in ready:
            self._accept()

    def _accept(self) -> None:
        try:
            connection, address = self._door.listener.accept()
        except OSError:
            return
        if len(self._guests) >= MAX_GUESTS:  # a node says who it is at once: the first is the least likely to be one
            self._guests.pop(0).link.close()
        link = Link(connection, self._door.parallel.node_timeout_seconds, self._bell.ring)
        guest = _Guest(link, address, Challenge(node_wire.PROTOCOL, os.urandom(greeting.NONCE_BYTES)), time.monotonic())
        link.send(guest.challenge)
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
        elif not SIDES.trusts(guest.challenge, self._key, hello):
            reason = "its LOCKSTEP_CLUSTER_KEY is not the leader's: set the same one on every node"
            self._refuse(guest, reason, f"a node at {guest.address} was refused: {reason}")
        else:
            self._judge(guest, hello, nodes)

    def _judge(self, guest: _Guest, hello: Hello, nodes: dict[int, Node]) -> None:
        """Let in who has the key, and suits."""
        try:
            who = msgspec.msgpack.decode(hello.identity, type=Identity)
        except NO_MESSAGE as e:
            reason = "its greeting cannot be read"
            self._refuse(guest, f"{reason}: {e}", f"a node at {guest.address} was refused: {reason}")
            return
        name = f"node {who.number} ({who.host}, pid {who.pid})"
        misfit = greeting.misfit(who, self._versions, self._settings, "node")
        if misfit:
            self._refuse(guest, misfit, f"{name} was refused: {misfit}")
            raise ExecutorError(f"{name} was refused: {misfit}.", phase="node", kind="refused")
        if who.number in nodes or who.number not in self._door.expected:
            there = nodes.get(who.number)
            reason = f"node_rank={who.number} is taken" + (f" by the one on {there.host}" if there else " by the leader")
            if who.number not in self._door.parallel.group:
                reason = f"node_rank={who.number} is of another replica, whose nodes report at another port"
            expected = self._door.expected
            advice = f"{reason}: give each node its own, from {expected.start} to {expected.stop - 1}"
            self._refuse(guest, advice, f"another {name} was refused: {reason}")
            return
        guest.link.frames.limit = node_wire.MESSAGE_BYTES
        guest.link.send(SIDES.welcome(guest.challenge, self._key, hello))
        nodes[who.number] = Node(who.number, who.host, guest.link)
        _log.info("%s has connected from %s", name, guest.address)

    def _refuse(self, guest: _Guest, reason: str, note: str) -> None:
        """Say why, and let it leave while others are heard."""
        guest.link.part(Refused(reason))
        self._leaving.append((guest.link, time.monotonic() + FAREWELL_S))
        self._note(note)

    def _let_go(self, ready: list[Any]) -> None:
        """Close the connections of those who have left, or take too long for it, or are too many."""
        now, crowd = time.monotonic(), len(self._leaving) - MAX_GUESTS
        kept = []
        for number, (link, until) in enumerate(self._leaving):
            if number < crowd or now > until or (link.socket in ready and link.gone()):
                link.close()
            else:
                kept.append((link, until))
        self._leaving = kept

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
        return ExecutorError(message, phase="node", kind="absent")
