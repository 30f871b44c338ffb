"""The worker processes on this host, and everything they say, in one place: what the leader and the agents of other hosts
have in common. What is to be done about it is the subclass's.
"""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lockstep.distributed.message_queue import MessageQueue, QueueHandle
from lockstep.distributed.progress import ProgressBoard
from lockstep.executor.link import Link, LinkLost
from lockstep.executor.node_wire import Message
from lockstep.executor.spawn import Channels, Plan, WorkerProcess, kill_all, spawn
from lockstep.utils import procs, stacks
from lockstep.utils.cores import RankCores
from lockstep.utils.net import Listener

if TYPE_CHECKING:
    from lockstep.executor.gather import RemoteRank

STACKS_S = 2.0  # time to write Python stacks, where not every rank is done sooner


class Crew:
    """One thread calls all of this: it starts the processes (the kernel's parent-death signal follows the thread that forked)
    and sleeps in `_listen` on everything at once."""

    def __init__(self, plan: Plan, cores: list[RankCores], cells: int) -> None:
        """cores: of each rank on this host. cells: of the progress board; the first are those of the ranks here."""
        self.plan, self.cores = plan, cores
        self.queue = MessageQueue.create(max(1, len(plan.ranks)))
        self.board = ProgressBoard.create(cells)
        self.local: list[WorkerProcess] = []
        self._selector = selectors.DefaultSelector()
        self._oom_kills = procs.oom_kills()
        self._death_pipe = os.pipe()  # the write end is only ever in this process: its end is our death

    # -- what the subclass does about it

    def _replied(self, worker: WorkerProcess, data: bytes) -> None:
        """Bytes from a rank's reply socket; empty: it closed that."""
        raise NotImplementedError

    def _said(self, worker: WorkerProcess, data: bytes) -> None:
        """Bytes that a rank wrote to its standard output or error."""
        raise NotImplementedError

    # -- for the subclass

    def _spawn_here(self, results: QueueHandle | None, rendezvous: tuple[str, int], listener: Listener | None = None) -> None:
        """Start the ranks of this host. results: where the output rank puts step results, if it is here."""
        channels = Channels(self.queue, results, self.board, self._death_pipe[0], rendezvous, listener)
        for rank, cores in zip(self.plan.ranks, self.cores, strict=True):
            worker = spawn(self.plan, rank, cores, channels)
            self.local.append(worker)
            self._selector.register(worker.reply, selectors.EVENT_READ, (self._read_reply, worker))
            self._selector.register(worker.log_fd, selectors.EVENT_READ, (self._read_log, worker))
            if worker.pid_fd >= 0:
                self._selector.register(worker.pid_fd, selectors.EVENT_READ, (None, worker))

    def _listen(self, nap_s: float) -> bool:
        """One round: sleep until something happens, at most `nap_s`, and read all of it. Whether a process ended."""
        ended = False
        for key, _ in self._selector.select(nap_s):
            read, what = key.data
            if read is None:
                ended = True
            else:
                read(what)
        return ended

    def _attend(self, link: Link, read: Callable[[Any], None], what: Any) -> None:
        """Watch a connection, for as long as it waits to send too."""
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.waits else 0)
        known = self._selector.get_map().get(link.socket)
        if known is None:
            self._selector.register(link.socket, wanted, (read, what))
        elif known.events != wanted:
            self._selector.modify(link.socket, wanted, (read, what))

    def _read_reply(self, worker: WorkerProcess) -> None:
        try:
            data = worker.reply.recv(1 << 20)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._unregister(worker.reply)
        self._replied(worker, data)

    def _read_log(self, worker: WorkerProcess) -> None:
        try:
            data = os.read(worker.log_fd, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self._unregister(worker.log_fd)
            return
        self._said(worker, data)

    def _unregister(self, what: int | socket.socket) -> None:
        try:
            self._selector.unregister(what)
        except (KeyError, ValueError):
            return

    def _drain(self, worker: WorkerProcess) -> None:
        """Read what a dead rank left in its pipes. A child of its own may hold them open: never wait."""
        for source, read in ((worker.reply, self._read_reply), (worker.log_fd, self._read_log)):
            for _ in range(64):
                if not self._readable(source):
                    break
                read(worker)

    def _readable(self, source: int | socket.socket) -> bool:
        if source not in self._selector.get_map():
            return False
        with selectors.DefaultSelector() as one:
            one.register(source, selectors.EVENT_READ)
            return bool(one.select(0))

    def _ask_for_stacks(self) -> None:
        """Have every rank here write its Python stack on its standard error. One that was stopped goes on, to its end."""
        for cell, worker in enumerate(self.local):
            if self.board.read(cell).phase not in ("", "spawn"):  # its handler is in place
                stacks.ask(worker.pid)

    def _await_stacks(self, workers: Sequence[WorkerProcess | RemoteRank], pump: Callable[[], None]) -> None:
        """Have every rank write its Python stack among its last lines. Of one here that does not react, py-spy is asked.

        pump: reads what ranks on other hosts wrote, which were asked before.
        """
        before = seen = {w.rank: w.tail.seen for w in workers}
        self._ask_for_stacks()
        deadline, quiet_rounds = time.monotonic() + STACKS_S, 0
        while time.monotonic() < deadline and quiet_rounds < 3:
            time.sleep(0.05)
            for worker in self.local:
                self._drain(worker)
            pump()
            last, seen = seen, {w.rank: w.tail.seen for w in workers}
            quiet_rounds = quiet_rounds + 1 if seen == last and all(seen[rank] > before[rank] for rank in seen) else 0
        for worker in self.local:
            if worker.tail.seen == before[worker.rank]:
                worker.tail.add(stacks.by_py_spy(worker.pid))

    def _out_of_memory(self) -> bool:
        """Whether the out-of-memory killer was busy in this process's cgroup since the start."""
        return procs.oom_kills() > self._oom_kills

    def _end_here(self) -> None:
        """Leave nothing of this host's ranks behind: no process, descriptor or mapping."""
        kill_all(self.local)
        self.queue.close()
        self._selector.close()
        for worker in self.local:
            worker.close()
        for fd in self._death_pipe:
            os.close(fd)
        self.board.close()


def received(link: Link) -> tuple[list[Message], str]:
    """What came over a connection, and why no more will; "" while more can."""
    try:
        link.flush()
        return link.receive(), ""
    except LinkLost as e:
        return [], str(e)
