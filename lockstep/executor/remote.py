"""The other hosts, as the leader sees them: it gives orders to their agents and hears from them what their ranks say."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from lockstep.distributed.progress import ProgressBoard
from lockstep.executor import node_wire
from lockstep.executor.crew import received
from lockstep.executor.gather import Door, Gathering, Node, RemoteRank
from lockstep.executor.link import Link, LinkLost
from lockstep.executor.node_wire import BEAT_S, Again, Beat, End, Ended, Leaving, Meeting, Order, Replied, Said, Stacks, Start
from lockstep.executor.spawn import Plan
from lockstep.observability.logging import get_logger, say
from lockstep.utils.shm import Bell

SILENT_S = 2.5 * BEAT_S  # a node that says nothing for so long may be what another rank's exception is about
_log = get_logger(__name__)


class Listener(Protocol):
    """Who is told what came."""

    def replied(self, worker: RemoteRank, data: bytes) -> None: ...
    def said(self, worker: RemoteRank, data: bytes) -> None: ...
    def node_lost(self, node: Node, why: str) -> None: ...


class Nodes:
    """All methods but `frame`, `give` and `say_again` are called by the monitor thread. Empty where there is one host."""

    def __init__(self, plan: Plan, door: Door | None, bell: Bell, board: ProgressBoard) -> None:
        self.ranks: list[RemoteRank] = []  # ascending, those of all other nodes
        self._plan, self._door, self._bell, self._board = plan, door, bell, board
        self._nodes: dict[int, Node] = {}
        self._started: tuple[Node, ...] = ()  # those that take orders
        self._ended = threading.Event()

    def gather(self, stopping: Callable[[], bool]) -> bool:
        """Wait until all are there. False when `stopping` became true. Raises ExecutorError when one is missing or unfit."""
        if self._door is None:
            return True
        config = self._plan.config
        settings = node_wire.agreed_settings(config, self._plan.spec)
        self._door.say_who_is_awaited(config.model.model, config.runtime.startup_timeout_seconds)
        return Gathering(self._door, settings, config.runtime.startup_timeout_seconds, self._bell, stopping).run(self._nodes)

    def start(self, rendezvous: tuple[str, int] | None, attend: Callable[[Link, Callable[[Node], None], Node], None], to: Listener) -> None:
        """Have every node start its ranks. attend: watches a link. to: is told what comes from now on.

        rendezvous: that rank 0 serves here; None: it is on the first of them, which says where; the others are started then.
        """
        self._attend, self._to = attend, to
        count, first = self._plan.config.parallel.local_world_size, self._plan.config.parallel.group.start
        for number, node in sorted(self._nodes.items()):
            ranks = range((number - first) * count, (number - first + 1) * count)
            node.ranks = {rank: RemoteRank(rank, f" on {node.name}") for rank in ranks}
            self.ranks += node.ranks.values()
            if rendezvous is not None or number == first:
                self._start(node, *(rendezvous or ("", 0)))
        self.watch()

    def tell_where_ranks_meet(self, host: str, port: int, where: str) -> None:
        """A line for who started this: what runs the ranks, and the addresses that other hosts must reach. where: who serves the port."""
        parallel, door = self._plan.config.parallel, self._door
        backend = parallel.distributed_executor_backend or "mp"
        if door is not None and _log.isEnabledFor(logging.WARNING):  # no warning, but to be seen where "waiting for node 1" is
            say(f"distributed_executor_backend is {backend}: {where}; nodes report at {door.at}, ranks meet at port {port} of {host}")

    def _start(self, node: Node, host: str, port: int) -> None:
        node.link.send(Start(self._plan.config, self._plan.spec, host, port, self._plan.again))
        self._started = (*self._started, node)

    def watch(self) -> None:
        """Look at every link again: whether it waits to send, whether it beats. Once a round."""
        for node in self._nodes.values():
            if node.ended:
                continue
            try:
                node.link.keep(_beat)
            except LinkLost as e:
                self._leave(node, str(e))
                continue
            self._attend(node.link, self._read, node)

    def frame(self, order: bytes) -> bytes:
        """An encoded order as `give` takes it. Raises FrameError (a ValueError) for one that is too long."""
        return node_wire.frame(Order(order)) if self._started else b""

    def say_again(self) -> None:
        """Tell every node that this leader comes again should this go wrong. From any thread; never waits."""
        self.give(node_wire.frame(Again()))

    def give(self, frame: bytes) -> None:
        """Give a framed order to every rank of every node, after all earlier ones. From any thread; never waits."""
        if self._ended.is_set():
            return
        for node in self._started:
            node.link.send_frame(frame)

    def ask_for_stacks(self) -> None:
        for node in self._nodes.values():
            node.link.send(Stacks())

    def pump(self) -> None:
        """Read what has come, without waiting."""
        for node in self._nodes.values():
            if not node.ended:
                self._read(node)

    def silent(self) -> bool:
        """Whether one has said nothing for suspiciously long."""
        return any(not node.ended and node.link.silent_s() > SILENT_S for node in self._nodes.values())

    def end(self, reason: str) -> None:
        """Tell everyone that it is over, and let go. reason: "" for an orderly end."""
        self._ended.set()
        if self._door is not None:
            self._door.listener.close()
        for node in self._nodes.values():
            node.link.send(End(reason))
        for node in self._nodes.values():
            node.link.close(linger=not node.ended)

    def _read(self, node: Node) -> None:
        messages, why = received(node.link)
        for message in messages:
            self._take(node, message)
        if why and not node.ended:
            self._leave(node, why)

    def _take(self, node: Node, message: node_wire.Message) -> None:
        if isinstance(message, Beat):
            self._show(node, message)
        elif isinstance(message, Meeting):
            self.tell_where_ranks_meet(message.host, message.port, f"rank {min(node.ranks)} on {node.name}")
            for other in self._nodes.values():
                if other is not node:
                    self._start(other, message.host, message.port)
        elif isinstance(message, Leaving):
            self._leave(node, message.reason)
        elif isinstance(message, Replied | Said | Ended):
            worker = node.ranks.get(message.rank)
            if worker is None:
                self._leave(node, f"it spoke for rank {message.rank}, which is not its own")
            elif isinstance(message, Replied):
                self._to.replied(worker, message.data)
            elif isinstance(message, Said):
                self._to.said(worker, message.data)
            else:
                worker.code, worker.oom = message.exitcode, message.oom

    def _show(self, node: Node, beat: Beat) -> None:
        if len(beat.cells) != len(node.ranks) or len(beat.states) != len(node.ranks):
            return  # it has not started them yet
        for worker, cell, letter in zip(node.ranks.values(), beat.cells, beat.states, strict=True):
            self._board.copy_in(worker.rank, cell, beat.now_ns)
            worker.letter = letter

    def _leave(self, node: Node, why: str) -> None:
        node.ended = True
        self._to.node_lost(node, why)


def _beat() -> Beat:
    return Beat(time.monotonic_ns())
